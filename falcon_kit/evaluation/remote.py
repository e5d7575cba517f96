"""A model behind an endpoint. It scores choices only where the server returns the log-probabilities of a prompt."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from falcon_kit.display.errors import require
from falcon_kit.evaluation.models import MARGIN, Answerer, Pair, going_on, line_end, plain_prompts, written
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.tasks import Task
from falcon_kit.evaluation.texts import Corpus
from falcon_kit.generation.chat import render
from falcon_kit.serving.endpoint import Endpoint
from falcon_kit.serving.serve import Served

_BLOCK, _BLOCKS = 2**16, 2**12  # bytes; blocks that are read of a file, so that 80 GB take seconds


class RemoteModel:
    """As `Model`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint, self.name, self.truncated = endpoint, endpoint.model, 0
        self.part_size = 4 * endpoint.concurrency

    def record(self) -> dict[str, Any]:
        """What the endpoint reports about itself; of one of `fk.serve`, not its random port but its weights."""
        endpoint = self._endpoint
        chat_format = endpoint.chat_format.name if endpoint.own_format else "the endpoint's own"
        record = {"server": endpoint.server, "chat format": chat_format}
        if not isinstance(endpoint, Served):
            return record | {"address": endpoint.address}
        require(endpoint.files.path.exists(), f"{endpoint!r}: start it again with fk.serve")
        weights = _digest(endpoint.files.path)
        return record | {"dtype": endpoint.plan.dtype, "context": endpoint.context, "weights": weights}

    def perplexity(self, corpus: Corpus, progress: Progress, stride: int | None) -> NoReturn:
        raise ValueError("perplexity needs the tokens of a text, which an endpoint does not give: load the model here")

    def prepare(self, pairs: Sequence[Pair], where: Sequence[str], truncate: bool) -> list[Any]:
        """The pairs; the server refuses one that is too long."""
        for place, (context, _) in zip(where, pairs, strict=True):
            require(context.strip() != "", f"{place} has no context, which an endpoint needs: load the model here")
        return [[context, continuation] for context, continuation in pairs]

    def run(self, inputs: Sequence[Any]) -> list[tuple[float, bool]]:
        """As `Model.run`: a token that reaches beyond the context belongs to the continuation."""
        echoed = self._endpoint.prompt_logprobs([context + continuation for context, continuation in inputs])
        found = []
        for (context, continuation), tokens in zip(inputs, echoed, strict=True):
            end = len(context.rstrip())
            scored = [each for each in tokens if each.start + len(each.text) > end]
            require(
                bool(scored or not continuation) and not any(math.isnan(each.logprob) for each in scored),
                f"{self.name} returns no log-probabilities for {continuation!r:.60} after {context!r:.60}: give a "
                "longer context, or load the model here",
            )
            found.append((math.fsum(each.logprob for each in scored), all(each.greedy for each in scored)))
        return found

    def rolling(self, texts: Sequence[str]) -> list[float]:
        raise ValueError("the log-likelihood of a text needs its tokens, which an endpoint does not give")

    def prompts(self, task: Task, chat: bool) -> list[str]:
        """As `Model.prompts`; in a chat the endpoint renders the question itself."""
        require(not (chat and task.is_question and task.is_choice), "an endpoint scores choices only without chat=True")
        return [item.text for item in task.items] if chat and task.is_question else plain_prompts(task)

    def answerer(self, task: Task, prompts: Sequence[str], chat: bool, truncate: bool) -> Answerer:
        longest = max(len(item.answer.encode()) for item in task.items)  # a token has a byte or more
        settings: dict[str, Any] = {"max_new_tokens": longest + MARGIN, "do_sample": False}
        settings |= {"truncate": "left"} if truncate else {}
        if not (is_chat := chat and task.is_question):
            settings["stop"] = line_end(task)

        def answer(prompts: Sequence[str]) -> list[Any]:
            asked: list[Any] = [[{"role": "user", "content": prompt}] if is_chat else prompt for prompt in prompts]
            return [written(each) for each in self._endpoint.generate_each(asked, **settings)]

        return answer

    def count_cut(self, prompts: Sequence[str], new_tokens: int) -> int:
        """None: the server refuses a prompt that is too long."""
        return 0

    def write(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        return [each.text for each in self._endpoint.generate_each(prompts, **settings)]

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The messages in the chat format that the endpoint was connected with. Raises ValueError without one."""
        require(
            self._endpoint.own_format,
            "lm-eval writes the whole conversation, in a chat format that the endpoint does not report: connect with "
            'fk.connect(..., chat="falcon"), or with the format of its model',
        )
        text = render(messages, self._endpoint.chat_format, add_generation_prompt, "<|endoftext|>")
        return text if add_generation_prompt else going_on(text, messages)


def _digest(path: Path) -> str:
    """The start of a SHA-256 of the weights in a folder or a GGUF file: of all bytes up to 256 MiB, of evenly spaced
    blocks of a larger file."""
    sha = hashlib.sha256()
    for each in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        size = each.stat().st_size
        sha.update(f"{size} ".encode())
        with each.open("rb") as file:
            for start in range(0, size, max(_BLOCK, size // _BLOCKS)):
                file.seek(start)
                sha.update(file.read(_BLOCK))
    return sha.hexdigest()[:16]
