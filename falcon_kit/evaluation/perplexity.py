"""Perplexity of texts of any length, in overlapping windows over the context.

The first token is predicted from the token that separates documents (<|endoftext|>), as lm-eval does. The first window
has `context` predicted tokens; each further one predicts the next `stride` tokens, given as many tokens before them as
fit. With stride = context the windows are those of lm-eval's `loglikelihood_rolling`: every token is predicted once,
from as little as one token before it. A smaller stride gives more context and takes more time: context / stride as
much.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from falcon_kit.display.errors import require
from falcon_kit.evaluation.progress import Progress
from falcon_kit.evaluation.scoring import Row, prefix_token, score
from falcon_kit.evaluation.statistics import Estimate, ratio
from falcon_kit.evaluation.texts import Corpus
from falcon_kit.generation.control_tokens import encode_prompts
from falcon_kit.inspection.hooks import InspectedModel

_BLOCK = 64
"""Tokens of a block of one text; the interval treats blocks as independent."""


@dataclass(frozen=True)
class Part:
    """A document, or a block of the only one."""

    where: str
    """File and line, or a number."""
    tokens: float
    """Predicted tokens."""
    bytes: float
    """UTF-8 bytes; for a block, its tokens' share of the text's."""
    words: float
    """Words, which white space separates, as lm-eval counts them; for a block as `bytes`."""
    nats: float
    """The sum of -ln p over the tokens."""


@dataclass(frozen=True, repr=False)
class Perplexity:
    """How well a model predicts a text. The lower, the better.

    Per token depends on the tokenizer, and compares models only where they share it. Per byte and per word do not.
    The interval is the normal one of a ratio of sums, over documents; for a single text over blocks of 64 tokens, whose
    dependence makes it somewhat too narrow.
    """

    name: str
    parts: tuple[Part, ...]
    """The documents, or the blocks of a single text."""
    sha256: str
    documents: int
    """The number of documents; the parts of a single one are its blocks."""

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return round(self._sum("tokens"))

    @property
    def bytes(self) -> int:
        """UTF-8 bytes."""
        return round(self._sum("bytes"))

    @property
    def words(self) -> int:
        """Words, which white space separates."""
        return round(self._sum("words"))

    @property
    def nats(self) -> float:
        """The sum of -ln p over all tokens: the negative log-likelihood of the text."""
        return self._sum("nats")

    @property
    def per_token(self) -> Estimate:
        """exp(nats / tokens): the usual perplexity."""
        return self._ratio("tokens").transformed(math.exp)

    @property
    def per_byte(self) -> Estimate:
        """exp(nats / bytes), lm-eval's byte_perplexity."""
        return self._ratio("bytes").transformed(math.exp)

    @property
    def per_word(self) -> Estimate:
        """exp(nats / words), lm-eval's word_perplexity; inf where it exceeds a float, as without spaces it may."""
        return self._ratio("words").transformed(lambda nats: math.inf if nats > 700 else math.exp(nats))

    @property
    def bits_per_byte(self) -> Estimate:
        """nats / bytes / ln 2: the size of the text compressed by the model, in bits for each of its bytes."""
        return self._ratio("bytes").transformed(lambda nats: nats / math.log(2))

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of a token."""
        return self.bytes / self.tokens

    def _sum(self, name: str) -> float:
        return math.fsum(getattr(part, name) for part in self.parts)

    def _ratio(self, name: str) -> Estimate:
        return ratio([part.nats for part in self.parts], [getattr(part, name) for part in self.parts])

    def __repr__(self) -> str:
        return f"Perplexity({self.name!r}: {self.per_token} per token, {self.bits_per_byte} bits per byte)"


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, scored) of each window over a prefix token and `tokens` tokens: ids[start:end], the last scored."""
    predicted = min(context, tokens)
    yield 0, predicted + 1, predicted
    while predicted < tokens:
        new = min(stride, tokens - predicted)
        predicted += new
        yield max(0, predicted - context), predicted + 1, new


def rows_of(encoded: Sequence[list[int]], context: int, stride: int) -> list[tuple[int, list[int], int]]:
    """(text, ids, scored) of each window over texts that begin with a prefix token; none of a text without others."""
    return [
        (text, ids[start:end], scored)
        for text, ids in enumerate(encoded)
        if len(ids) > 1
        for start, end, scored in windows(len(ids) - 1, context, stride)
    ]


def measure(
    inspected: InspectedModel, corpus: Corpus, progress: Progress, stride: int | None, batch_size: int | None = None
) -> Perplexity:
    """The perplexity of a corpus. `progress` stores the windows that are done.

    Raises ValueError for a stride out of range, or a text with fewer than two tokens.
    """
    context = inspected.spec.context
    stride = stride or max(1, context // 2)
    require(1 <= stride <= context, f"stride={stride} is not between 1 and {context}, the model's context")
    prefix = prefix_token(inspected.tokenizer)
    encoded = [[prefix, *ids] for ids in encode_prompts(corpus.documents, inspected.tokenizer)]
    require(
        sum(map(len, encoded)) - len(encoded) >= 2,
        f"the text {corpus.name!r} has fewer than two tokens: give a longer one",
    )
    if empty := [where for where, ids in zip(corpus.where, encoded, strict=True) if len(ids) == 1]:
        raise ValueError(f"{empty[0]} has no tokens in this vocabulary: leave it out")
    rows = rows_of(encoded, context, stride)

    def run(part: Sequence[tuple[int, list[int], int]]) -> list[list[float]]:
        scored = score(inspected, [Row(tuple(ids), count) for _, ids, count in part], batch_size)
        return [each.logprobs.tolist() for each in scored]

    losses: list[list[float]] = [[] for _ in encoded]
    for (document, _, _), logprobs in zip(rows, progress.map(f"text {corpus.name}", rows, run), strict=True):
        losses[document] += [-each for each in logprobs]
    return Perplexity(corpus.name, tuple(_parts(corpus, losses)), corpus.sha256, len(losses))


def _parts(corpus: Corpus, losses: Sequence[Sequence[float]]) -> Iterator[Part]:
    """A part for each document; for a single one its blocks, of about equal length."""
    for where, text, nats in zip(corpus.where, corpus.documents, losses, strict=True):
        tokens, size, words = len(nats), len(text.encode()), len(re.split(r"\s+", text))
        blocks = max(1, tokens // _BLOCK) if len(losses) == 1 else 1
        edges = [round(number * tokens / blocks) for number in range(blocks + 1)]
        for number, (start, end) in enumerate(pairwise(edges), 1):
            share = (end - start) / tokens
            label = where if blocks == 1 else f"{where}, block {number}"
            yield Part(label, end - start, share * size, share * words, math.fsum(nats[start:end]))
