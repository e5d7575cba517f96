"""A check of your own: a function, or a text-classification pipeline of transformers. An error blocks the text."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from falcon_kit.display.errors import check_known, require
from falcon_kit.guardrails.matching import Growing
from falcon_kit.guardrails.verdict import Finding

Judge = Callable[[str], Any]
"""Takes a text; returns a reason to block it, or True; None, False or "" for a harmless text."""
# A sentence, or 400 characters of a longer one.
_PASSAGE = re.compile(r"(?s).{0,398}?(?:[.!?…](?=\s)|[\n。！？؟।])|.{400}")


class Custom:
    """A check of your own. A prompt (`whole`) is read at once, an output sentence by sentence, before it is shown."""

    def __init__(self, name: str, judge: Judge, whole: bool) -> None:
        self._name, self._judge, self._whole = name, judge, whole
        self._unread, self._first = "", 0

    def waiting(self, text: Growing) -> int:
        return self._first

    def read(self, text: Growing) -> list[Finding]:
        self._unread += text.newest
        findings = []
        for passage in self._passages(text.ended):
            findings += self._findings(passage) if passage.strip() else []
            self._first += len(passage)
        return findings

    def _passages(self, ended: bool) -> Iterator[str]:
        """The passages that are complete; they do not depend on the pieces in which the text arrived."""
        while not self._whole and (match := _PASSAGE.match(self._unread)):
            self._unread = self._unread[match.end() :]
            yield match[0]
        if ended and self._unread:
            passage, self._unread = self._unread, ""
            yield passage

    def _findings(self, passage: str) -> list[Finding]:
        """What the function objects to in the next passage; an error, or a value of another type, is a finding."""
        try:
            reason = self._judge(passage)
            if not isinstance(reason, str | bool | None):
                raise TypeError
        except Exception as error:  # noqa: BLE001  # its message may contain the text: only its type is reported
            reason = f"the check {self._name} failed: {type(error).__name__}"
            logging.getLogger(__name__).warning("%s; the text is blocked", reason)
        if not reason:
            return []
        reason = reason if isinstance(reason, str) else f"the check {self._name} objects"
        return [Finding((self._first, self._first + len(passage)), self._name, reason)]


def classifier(pipeline: Any, labels: Sequence[str], threshold: float) -> Judge:
    """A function that blocks what a text-classification pipeline gives one of some labels, with at least this score.

    Raises ValueError without labels, or for one that the pipeline's model does not have.
    """
    known = list(pipeline.model.config.id2label.values())
    require(bool(labels), f"a classifier needs labels=(...): those that block a text, of {', '.join(known)}")
    for label in labels:
        check_known("label", label, known)

    def judge(text: str) -> str | None:
        for part in _parts(text, pipeline):
            scores = pipeline(part, top_k=None)
            scores = scores[0] if scores and isinstance(scores[0], list) else scores
            for each in scores:
                if each["label"] in labels and each["score"] >= threshold:
                    return f"{each['label']} with a score of {each['score']:.2f}"
        return None

    return judge


def _parts(text: str, pipeline: Any) -> Iterator[str]:
    """A text in parts that fit the classifier's context, halved at spaces."""
    context = getattr(pipeline.model.config, "max_position_embeddings", math.inf) - 2  # RoBERTa's begin at 2
    if len(text) < 2 or len(pipeline.tokenizer(text)["input_ids"]) <= min(pipeline.tokenizer.model_max_length, context):
        yield text
        return
    middle = text.rfind(" ", 1, len(text) // 2) + 1 or len(text) // 2
    yield from _parts(text[:middle], pipeline)
    yield from _parts(text[middle:], pipeline)


def named_judges(
    custom: Judge | Mapping[str, Judge] | None, labels: Sequence[str], threshold: float
) -> Iterator[tuple[str, Judge]]:
    """The custom checks with their names. Raises ValueError for what cannot be called, and for labels of nothing."""
    name = getattr(custom, "__name__", type(custom).__name__)
    checks = custom if isinstance(custom, Mapping) else {} if custom is None else {name: custom}
    require(
        not labels or any(map(_is_pipeline, checks.values())), "labels=(...) needs custom= a classification pipeline"
    )
    for name, check in checks.items():
        require(callable(check), f"the custom check {name!r} must be callable, got a {type(check).__name__}")
        yield name, classifier(check, labels, threshold) if _is_pipeline(check) else check


def _is_pipeline(check: Judge) -> bool:
    return any(each.__name__ == "TextClassificationPipeline" for each in type(check).__mro__)  # without importing it
