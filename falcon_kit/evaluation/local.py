"""A model in this process: what `fk.load` returns, or a pair (model, tokenizer)."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from falcon_kit.catalogue.names import loadable_name
from falcon_kit.display.errors import require
from falcon_kit.evaluation import perplexity
from falcon_kit.evaluation.models import BATCH, MARGIN, Answerer, Pair, going_on, line_end, plain_prompts, written
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.scoring import Row, encode_pairs, prefix_token, score
from falcon_kit.evaluation.tasks import Task
from falcon_kit.evaluation.texts import Corpus
from falcon_kit.generation.arguments import end_token_ids
from falcon_kit.generation.chat import ChatFormat, encode, render_prompt
from falcon_kit.generation.control_tokens import encode_prompt, encode_prompts, encode_text
from falcon_kit.generation.generate import generate
from falcon_kit.generation.own_format import end_tokens
from falcon_kit.inspection.hooks import evaluation_mode, inspect_model
from falcon_kit.loading.adapters import attached_digest, model_fingerprint
from falcon_kit.loading.quantization import stored_quantisation
from falcon_kit.parallel.launching import ParallelFalcon

_PROBE = "The quick brown fox jumps over the lazy dog."
"""A text whose first log-probabilities stand for the weights."""


class LocalModel:
    """As `Model`."""

    def __init__(self, falcon: Any, batch_size: int | None = None) -> None:
        if isinstance(falcon, ParallelFalcon):
            raise TypeError(
                "the weights of a ParallelFalcon are in other processes, whose log-probabilities cannot be read here: "
                "load the model without tensor_parallel, on one device or with its layers on several"
            )
        self._falcon, self._batch_size, self.truncated = falcon, batch_size, 0
        self._asked: dict[str, list[int]] = {}  # prompts whose special tokens are a user's text: their token ids
        self.part_size = 2 * BATCH
        self.inspected = inspect_model(falcon)
        self.tokenizer: Any = self.inspected.tokenizer
        self.name = loadable_name(self.inspected.spec, getattr(self.inspected.model, "name_or_path", "") or "")

    def record(self) -> dict[str, Any]:
        """What identifies the model's weights."""
        config = self.inspected.decoder.config
        ids = [prefix_token(self.tokenizer), *encode_prompt(_PROBE, self.tokenizer)]
        (probe,) = score(self.inspected, [Row(tuple(ids), len(ids) - 1)])
        return {
            "revision": getattr(config, "_commit_hash", None),
            "fingerprint": model_fingerprint(self.inspected.decoder),
            "adapter": attached_digest(self.inspected.model),
            "dtype": stored_quantisation(config) or str(self.inspected.model.dtype).removeprefix("torch."),
            "probe": [round(float(each), 3) for each in probe.logprobs[:8]],
            "context": self.inspected.spec.context,
            "chat format": getattr(getattr(self._falcon, "chat_format", None), "name", None),
        }

    def perplexity(self, corpus: Corpus, progress: Progress, stride: int | None) -> perplexity.Perplexity:
        return perplexity.measure(self.inspected, corpus, progress, stride, self._batch_size)

    def prepare(self, pairs: Sequence[Pair], where: Sequence[str], truncate: bool) -> list[Any]:
        """The token ids of each pair, and how many of them are scored."""
        context = self.inspected.spec.context
        inputs = []
        split = encode_pairs(self.tokenizer, pairs)
        for place, (prompt, answer), (first, rest) in zip(where, pairs, split, strict=True):
            if prompt in self._asked:
                first, rest = self._asked[prompt], encode_text(answer, self.tokenizer)
            ids = [*first, *rest]
            excess = len(ids) - 1 - context  # the model does not read the last token
            require(
                len(rest) <= context, f"{place}: the answer has {len(rest)} tokens, the model's context is {context}"
            )
            require(
                excess <= 0 or truncate,
                f"{place} has {len(ids) - 1} tokens, the model's context is {context}: shorten it, or give "
                'truncate="left" to drop its beginning',
            )
            self.truncated += excess > 0
            inputs.append([ids[max(0, excess) :], len(rest)])
        return inputs

    def run(self, inputs: Sequence[Any]) -> list[tuple[float, bool]]:
        scores = score(self.inspected, [Row(tuple(ids), scored) for ids, scored in inputs], self._batch_size)
        return [(each.total, each.greedy) for each in scores]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """As lm-eval: windows of the context, each after one token of the one before."""
        context, prefix = self.inspected.spec.context, prefix_token(self.tokenizer)
        encoded = [[prefix, *ids] for ids in encode_prompts(texts, self.tokenizer)]
        rows = perplexity.rows_of(encoded, context, context)
        scores = score(self.inspected, [Row(tuple(ids), scored) for _, ids, scored in rows], self._batch_size)
        totals = [0.0] * len(texts)
        for (text, _, _), each in zip(rows, scores, strict=True):
            totals[text] += each.total
        return totals

    def prompts(self, task: Task, chat: bool) -> list[str]:
        """As `Model.prompts`. Raises ValueError for a chat with a pair (model, tokenizer)."""
        chat_format = self._chat_format(chat)
        if chat_format is None or not task.is_question:
            return plain_prompts(task)
        texts = []
        for item in task.items:
            messages = [{"role": "user", "content": item.text}]
            texts.append(render_prompt(messages, self.tokenizer, chat_format))
            ids = encode(messages, self.tokenizer, chat_format)
            if ids != encode_prompt(texts[-1], self.tokenizer):
                self._asked[texts[-1]] = ids
        return texts

    def answerer(self, task: Task, prompts: Sequence[str], chat: bool, truncate: bool) -> Answerer:
        chat_format, context = self._chat_format(chat and task.is_question), self.inspected.spec.context
        longest = max(self._lengths([item.answer for item in task.items]))
        for item, length in zip(task.items, self._lengths(prompts), strict=True):
            require(
                truncate or length + longest <= context,
                f"{item.where} has {length} tokens, the model's context is {context}, and an answer needs {longest}: "
                'shorten it, or give truncate="left" to drop its beginning',
            )
        settings: dict[str, Any] = {"do_sample": False, "strip": True, "max_new_tokens": longest + MARGIN}
        settings |= {"stop": line_end(task)} if chat_format is None else self._chat_settings(chat_format)
        settings |= {"truncate": "left"} if truncate else {}
        return lambda prompts: [written(each) for each in self._generate(prompts, settings)]

    def count_cut(self, prompts: Sequence[str], new_tokens: int) -> int:
        """As `Model.count_cut`: at least half of the context stays for a prompt."""
        room = self.inspected.spec.context - min(new_tokens, self.inspected.spec.context // 2)
        return sum(length > room for length in self._lengths(prompts))

    def write(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        return [each.text for each in self._generate(prompts, {**settings, "truncate": "left"})]

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        chat_format: Any = self._chat_format(chat=True)  # not None in a chat
        text = render_prompt(messages, self.tokenizer, chat_format, add_generation_prompt)
        return text if add_generation_prompt else going_on(text, messages)

    def _generate(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[Any]:
        model, tokenizer = self._falcon
        call: Any = getattr(self._falcon, "generate", partial(generate, model, tokenizer))
        size = self._batch_size or BATCH
        found = []
        with evaluation_mode(self.inspected.model):
            for is_asked, group in groupby(prompts, self._asked.__contains__):
                texts = list(group)
                if is_asked:
                    found += [call(self._asked[each], **settings) for each in texts]
                else:
                    for start in range(0, len(texts), size):
                        found += call(texts[start : start + size], **settings)
        return found

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text."""
        encoded = encode_prompts(texts, self.tokenizer)
        return [len(self._asked.get(text, ids)) for text, ids in zip(texts, encoded, strict=True)]

    def _chat_settings(self, chat_format: ChatFormat) -> dict[str, Any]:
        """What ends an answer in a chat."""
        ends = end_token_ids({}, self.inspected.model.generation_config, self.tokenizer)
        ends = [*dict.fromkeys([*ends, self.tokenizer.eos_token_id, *end_tokens(self.tokenizer, chat_format)])]
        return {"stop": chat_format.stop, "eos_token_id": ends}

    def _chat_format(self, chat: bool) -> ChatFormat | None:
        require(
            not chat or hasattr(self._falcon, "chat_format"),
            "chat=True needs a chat format: give what fk.load returns, not a pair (model, tokenizer)",
        )
        return self._falcon.chat_format if chat else None
