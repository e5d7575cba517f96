"""Documents become rows of tokens, several documents to a row, with a mark on the tokens that are trained on.

The model is trained on the answers of the assistant, except those with weight 0, and on the end-of-sequence token
after the last one; of a plain text, on all tokens. The positions of every document in a row start at 0. From them the
kit's Falcon derives a mask that keeps documents apart; with transformers' own Falcon, a document attends to those
before it.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from falcon_kit.catalogue.spec import context_limit
from falcon_kit.display.errors import check_flag, is_whole, plain_scalar, printable, shown, to_save
from falcon_kit.display.page import direction
from falcon_kit.display.tables import counted
from falcon_kit.display.warning import warn
from falcon_kit.generation.chat import ChatFormat, answer_texts, encode_answers
from falcon_kit.generation.control_tokens import encode_text
from falcon_kit.generation.prompts import tensor_parallel_mesh
from falcon_kit.loading.falcon import Falcon
from falcon_kit.model.losses import IGNORED
from falcon_kit.parallel.launching import ParallelFalcon
from falcon_kit.tuning.data import Documents, Problem, check_documents, first_problems, store

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

FEATURES = Features({"ids": List(Value("int32")), "trained": List(Value("bool")), "where": Value("string")})


@dataclass(frozen=True)
class Example:
    """The tokens of one document; Jupyter colours those that are trained on."""

    ids: Sequence[int]
    trained: Sequence[bool]
    """For each token whether it is trained on."""
    where: str
    """File and line of the document."""
    tokenizer: PreTrainedTokenizerBase

    def spans(self) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is trained on; special tokens are included."""
        edges = [0, *(np.flatnonzero(np.diff(self.trained)) + 1).tolist(), len(self.ids)]
        return [
            (str(self.tokenizer.decode(list(self.ids[start:end]))), bool(self.trained[start]))
            for start, end in pairwise(edges)
        ]

    def __repr__(self) -> str:
        return f"Example({printable(self.where)}, {counted(len(self.ids), 'token')}, {sum(self.trained)} trained on)"

    def _repr_html_(self) -> str:
        styles = {True: "background:rgba(0,158,115,.35)", False: "opacity:.65"}  # Okabe and Ito's green
        spans = self.spans()
        pieces = (f'<span style="{styles[trained]}"><bdi>{html.escape(text)}</bdi></span>' for text, trained in spans)
        legend = f"{html.escape(self.where)}: <span style='{styles[True]}'>trained on</span>, "
        legend += f"<span style='{styles[False]}'>only read</span>"
        way = direction("".join(text for text, _ in spans))
        return f'<div dir="{way}" style="white-space:pre-wrap">{"".join(pieces)}</div><small>{legend}</small>'


class Packed(Sequence[dict[str, Any]]):
    """Rows to train on: `packed[i]` has input_ids, labels and position_ids of row i, each a numpy array (T,).

    The label of a token that is only read is -100. position_ids begin at 0 in each document.
    """

    def __init__(
        self,
        examples: Dataset,
        rows: Sequence[Sequence[int]],
        context: int,
        tokenizer: PreTrainedTokenizerBase,
        chat_format: ChatFormat,
        problems: Sequence[Problem] = (),
        folders: Sequence[Any] = (),
    ) -> None:
        self.examples = examples.with_format("numpy")
        """The tokens of the documents, mapped from disk."""
        self.rows = rows
        """For each row the indices of its documents."""
        self.context = context
        """Tokens in a row, at most."""
        self.tokenizer = tokenizer
        """The tokenizer of the tokens."""
        self.chat_format = chat_format
        """The chat format of the conversations; of joined rows, that of the first."""
        self.problems = tuple(problems)
        """Conversations that were cut, changed by the chat format or left out, and why."""
        self.lengths = lengths(examples)
        """The number of tokens of each document."""
        self.trained_tokens = sum(part.flatten().true_count for part in column(examples, "trained"))
        """The number of tokens that are trained on."""
        self._folders = tuple(folders)  # temporary folders, which exist as long as rows in them are used

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """One row; for a slice, Packed."""
        if isinstance(index, slice):
            return self._slice(self.rows[index])
        examples = [self.examples[each] for each in self.rows[index]]
        return {
            "input_ids": np.concatenate([each["ids"] for each in examples]),
            "labels": np.concatenate([np.where(each["trained"], each["ids"], IGNORED) for each in examples]),
            "position_ids": np.concatenate([np.arange(len(each["ids"])) for each in examples]),
            "row": index,
        }

    def _slice(self, rows: Sequence[Sequence[int]]) -> Packed:
        kept = [index for row in rows for index in row]
        new_index = {old: new for new, old in enumerate(kept)}
        examples = self.examples.with_format(None).select(kept)
        renumbered = [[new_index[old] for old in row] for row in rows]
        return self._with(examples, renumbered, self.problems, self._folders)

    def __add__(self, other: Packed) -> Packed:
        """The rows of both, for documents that were packed separately, such as in two chat formats.

        Raises ValueError for another context or vocabulary.
        """
        if (self.context, self.tokenizer.get_vocab()) != (other.context, other.tokenizer.get_vocab()):
            raise ValueError(
                f"rows of {self.context} and of {other.context} tokens, or of two tokenizers, cannot be joined: pack "
                "both with the same context and tokenizer"
            )
        examples = concatenate_datasets([each.examples.with_format(None) for each in (self, other)])
        rows = [*self.rows, *([len(self.lengths) + index for index in row] for row in other.rows)]
        return self._with(examples, rows, self.problems + other.problems, self._folders + other._folders)

    def _with(self, examples: Dataset, rows: Sequence[Sequence[int]], problems: Any, folders: Any) -> Packed:
        return Packed(examples, rows, self.context, self.tokenizer, self.chat_format, problems, folders)

    def example(self, index: int) -> Example:
        """One document."""
        row = self.examples[index]
        return Example(row["ids"].tolist(), row["trained"].tolist(), str(row["where"]), self.tokenizer)

    def places(self, row: int) -> list[str]:
        """Files and lines of the documents in a row."""
        return [str(self.examples[each]["where"]) for each in self.rows[row]]

    @property
    def tokens(self) -> int:
        """The number of tokens of all documents."""
        return sum(self.lengths)

    @property
    def padding(self) -> float:
        """Share of padding in rows of the full context."""
        return 1 - self.tokens / max(1, len(self) * self.context)

    @property
    def padding_alone(self) -> float:
        """Share of padding with one document to a row."""
        return 1 - self.tokens / max(1, len(self.lengths) * self.context)

    def __repr__(self) -> str:
        left = f"; {len(self.problems)} cut, changed or left out, see .problems" if self.problems else ""
        share = self.trained_tokens / max(1, self.tokens)
        return (
            f"Packed({counted(len(self.lengths), 'document')} of {counted(self.tokens, 'token')}, "
            f"{share:.0%} trained on, "
            f"in {counted(len(self), 'row')} of {self.context}: {self.padding:.1%} padding, "
            f"{self.padding_alone:.1%} with a row for each{left})"
        )


def pack(documents: Documents, falcon: Falcon, context: int | None = None, *, together: bool = True) -> Packed:
    """Rows of at most `context` tokens (by default the model's context), with several documents to a row.

    Conversations are rendered in the Falcon's chat format. A text longer than a row is continued in another one. A
    longer conversation is cut after an answer, or left out if its first answer does not fit; a chat format may change
    an answer, as "hub" drops blank lines. Warns of these, and lists them in `Packed.problems`. `together=False`: one
    document to a row. Rows are filled first-fit, the longest documents first.
    Raises ValueError for a context out of range, a tokenizer without an eos_token, or nothing to train on, and
    TypeError for other documents than those of `dialogues`.
    """
    check_documents(documents, "fk.pack")
    check_falcon(falcon)
    check_flag("together", together)
    limit = context_limit(falcon.model.config)
    context = limit if context is None else plain_scalar(context)
    if not is_whole(context, 8, limit):
        raise ValueError(
            f"context={shown(context)} is not between 8 and {limit}, the context of {printable(falcon.spec.name)}"
        )
    if falcon.tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so the model cannot learn to stop: set tokenizer.eos_token"
        )
    problems: list[Problem] = []
    encoder = _Encoder(falcon.tokenizer, falcon.chat_format, context, problems)
    stored = store((row for document in documents for row in encoder(document)), FEATURES)
    if stored is None:
        raise ValueError(f"no document has anything to train on within {context} tokens{first_problems(problems)}")
    if problems:
        count = len({each.where for each in problems})
        which = f"{counted(count, 'conversation')} {'is' if count == 1 else 'are'} cut, changed or left out"
        warn(f"{which}{first_problems(problems)}")
    examples, folder = stored
    rows = first_fit(lengths(examples), context) if together else [[index] for index in range(len(examples))]
    return Packed(examples, rows, context, falcon.tokenizer, falcon.chat_format, problems, [folder])


def check_falcon(value: Any) -> None:
    """Raises TypeError for anything but a Falcon in one process, such as a name or a transformers model."""
    divided = isinstance(value, Falcon) and tensor_parallel_mesh(value.model) is not None
    if divided or isinstance(value, ParallelFalcon):
        raise TypeError(
            "this model's layers are divided among processes (tensor_parallel), where they cannot be trained: load it "
            "without tensor_parallel; to train on several GPUs, fk.tune shards it (shard=True)"
        )
    if not isinstance(value, Falcon):
        hint = f": fk.load({value!r})" if isinstance(value, str) else ""
        raise TypeError(f"give what fk.load returns{hint}; got {type(value).__name__}{to_save(value)}")


def column(examples: Dataset, name: str) -> Iterator[Any]:
    """A column of the examples, also of selected ones, in parts of arrow's memory."""
    for batch in examples.select_columns(name).with_format("arrow").iter(batch_size=10_000):
        yield from batch.column(name).chunks


def lengths(examples: Dataset) -> list[int]:
    """The number of tokens of each example, from arrow's offsets: no token is read."""
    return [length for part in column(examples, "ids") for length in part.value_lengths().to_pylist()]


@dataclass(frozen=True)
class _Encoder:
    """Encodes a document as examples that fit into a row."""

    tokenizer: PreTrainedTokenizerBase
    format: ChatFormat
    context: int
    problems: list[Problem]

    def __call__(self, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        where = document["where"]
        pairs = self._text(document["text"]) if document["text"] else self._dialogue(document, where)
        for ids, trained in pairs:
            yield {"ids": ids, "trained": trained, "where": where}

    def _text(self, text: str) -> Iterator[tuple[list[int], list[bool]]]:
        """A text and its eos_token, in pieces; the first token of a piece has no context, so it is not trained on.

        A piece of one token would train nothing: it begins one token earlier.
        """
        ids = [*encode_text(text, self.tokenizer), self.tokenizer.eos_token_id]
        for start in range(0, len(ids), self.context):
            piece = ids[min(start, len(ids) - 2) : start + self.context]
            yield piece, [False] + [True] * (len(piece) - 1)

    def _dialogue(self, document: Mapping[str, Any], where: str) -> Iterator[tuple[list[int], list[bool]]]:
        """The conversation without those of its last exchanges that do not fit."""
        kept = messages = document["messages"]
        ids, trained = encode_answers(kept, self.tokenizer, self.format, document["untrained"])
        while len(ids) > self.context and len(kept) > 3:
            kept = kept[:-2]
            ids, trained = encode_answers(kept, self.tokenizer, self.format, document["untrained"])
        within = f"within {self.context} tokens"
        if len(ids) > self.context:
            self.problems.append(Problem(where, f"the first answer does not end {within}: left out"))
            return
        if not any(trained):
            self.problems.append(Problem(where, f"every answer {within} has weight 0: left out"))
            return
        if len(kept) < len(messages):
            exchanges = counted((len(messages) - len(kept)) // 2, "exchange")
            self.problems.append(Problem(where, f"longer than {self.context} tokens: without the last {exchanges}"))
        given = [each["content"].strip() for each in kept if each["role"] == "assistant"]
        if answer_texts(kept, self.tokenizer, self.format) != given:
            changed = f"the chat format {self.format.name!r} changes an answer, such as its blank lines"
            self.problems.append(Problem(where, f"{changed}: fk.load(..., chat='falcon') keeps it"))
        yield ids, trained


def first_fit(lengths: Sequence[int], context: int) -> list[list[int]]:
    """The documents of each row: the longest first, each put into the first row that has room for it.

    First-fit decreasing takes at most 11/9 of the fewest rows possible plus two thirds of a row (Dosa 2007). A tree of
    the largest room below each node finds the row in logarithmic time.
    """
    if (longest := max(lengths, default=0)) > context:
        raise ValueError(f"a document of {longest} tokens does not fit into rows of {context}")
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = np.full(2 * size, context, dtype=np.int64)  # a binary heap: the children of i are 2i and 2i + 1
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - size == len(rows):
            rows.append([])
        rows[node - size].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch (B, T), padded to its longest row.

    The padding of a row is one more document, without labels. Since no other attends to it, any token will do.
    """
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int | None) -> Tensor:
        parts = []
        for row in rows:
            missing = longest - len(row[name])
            padding = np.arange(missing) if value is None else np.full(missing, value)
            parts.append(np.concatenate([row[name], padding]))
        return torch.from_numpy(np.stack(parts).astype(np.int64))

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "position_ids": padded("position_ids", None),
        "rows": torch.tensor([row["row"] for row in rows]),
    }
