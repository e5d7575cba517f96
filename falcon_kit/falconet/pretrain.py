"""Trains Falconet from random weights: first the tokenizer, then the base model.

    python -m falcon_kit.falconet.corpus      # first, generates the text
    python -m falcon_kit.falconet.pretrain    # about an hour on 2 cores; resumes when started again

The base model is trained in three phases: (1) rows that each repeat one random sequence, from which induction heads
form much sooner than from text (Olsson et al. 2022, arXiv 2209.11895, call it a phase change); (2) text, packed in rows
of 512 tokens, with some repeated rows so that the induction heads remain; (3) rows of the full context.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import FalconConfig, FalconForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.catalogue.spec import SPECIAL_TOKENS
from falcon_kit.display.saving import atomic_file
from falcon_kit.falconet.corpus import SIZES, WORK
from falcon_kit.generation.chat import FALCON, save_tokenizer
from falcon_kit.loading.gguf import byte_level_bpe

VOCABULARY = 2048
CONTEXT = 2048
SPECIAL = " ".join((*SPECIAL_TOKENS, "<|pad|>"))
"""Falcon's twelve special tokens with their published ids 0 to 11, then a pad token, which Falcon does not have."""
FIRST_ORDINARY_ID = len(SPECIAL.split())


@dataclass(frozen=True)
class Phase:
    """One phase of the training of the base model."""

    name: str
    steps: int
    rows: int
    """Rows in a batch."""
    length: int
    """Tokens in a row."""
    repeated: float
    """Share of rows that repeat one random sequence instead of containing text."""
    rates: tuple[float, float]
    """Learning rate of the first and of the last step; linear in between."""
    period: tuple[int, int] = (8, 128)
    """Length of the shortest and of the longest random sequence, in tokens."""


PHASES = (
    Phase("induction", steps=500, rows=32, length=97, repeated=1.0, rates=(2e-3, 2e-3), period=(8, 40)),
    Phase("text", steps=2300, rows=8, length=512, repeated=0.1, rates=(2e-3, 3e-4)),
    Phase("context", steps=120, rows=2, length=CONTEXT, repeated=0.25, rates=(3e-4, 0.0), period=(32, 512)),
)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens with the pre-tokenizers of Falcon's own tokenizer."""
    tokenizer = byte_level_bpe({}, [], [])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL.split()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = FALCON.template
    return wrapped


def new_model(vocabulary: int) -> FalconForCausalLM:
    """An untrained Falcon of the 40B layout: 4 query heads, 2 KV heads, head_dim 64, parallel block, 2 LayerNorms."""
    config = FalconConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        max_position_embeddings=CONTEXT,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=11,
        eos_token_id=11,
        pad_token_id=12,
        tie_word_embeddings=True,
    )
    return FalconForCausalLM(config)


def pack(path: Path, tokenizer: PreTrainedTokenizerFast, length: int) -> np.ndarray:
    """The corpus as token ids (rows, length). Each row starts with a document; its last document is truncated."""
    rows, row = [], []
    with path.open(encoding="utf-8") as file:
        for line in file:
            row += tokenizer(json.loads(line))["input_ids"]
            if len(row) >= length:
                rows.append(row[:length])
                row = []
    return np.array(rows, dtype=np.uint16)


def repeated_rows(phase: Phase, count: int, vocabulary: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids (count, length): each row repeats one random sequence, from a random position in it."""
    rows = []
    for _ in range(count):
        sequence = rng.integers(FIRST_ORDINARY_ID, vocabulary, size=rng.integers(phase.period[0], phase.period[1] + 1))
        start = rng.integers(len(sequence))
        rows.append(np.resize(np.roll(sequence, start), phase.length))
    return np.stack(rows)


def batch(phase: Phase, step: int, text: np.ndarray, vocabulary: int, seed: int) -> torch.Tensor:
    """Token ids (phase.rows, phase.length) of one step: a pure function, so a resumed run is identical."""
    rng = np.random.default_rng([seed, step, phase.length])
    repeated = int(rng.binomial(phase.rows, phase.repeated))
    per_row = max(1, phase.length // text.shape[1])  # packed rows that are joined into one longer row
    first = step * phase.rows * per_row
    chosen = text[np.arange(first, first + (phase.rows - repeated) * per_row) % len(text)].reshape(
        -1, per_row * text.shape[1]
    )
    parts = [chosen[:, : phase.length]]
    if repeated:
        parts.append(repeated_rows(phase, repeated, vocabulary, rng))
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def train(
    model: FalconForCausalLM,
    phases: tuple[Phase, ...],
    text: np.ndarray,
    state: Path,
    seed: int,
    save_every: float = 60.0,
) -> None:
    """Trains `model` in place. Every `save_every` seconds it writes the file `state`, from which a new call resumes.

    Raises ValueError for a state of another seed, other phases or another text.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    record = {"seed": seed, "phases": repr(phases), "text": hashlib.sha256(text.tobytes()).hexdigest()}
    done = _resume(state, model, optimizer, record)
    schedule = [(phase, step) for phase in phases for step in range(phase.steps)]
    bar = tqdm(schedule[done:], initial=done, total=len(schedule), desc=state.stem, unit=" steps", mininterval=1.0)
    model.train()
    saved = time.monotonic()
    for count, (phase, step) in enumerate(bar, start=done + 1):
        ids = batch(phase, step, text, model.config.vocab_size, seed).to(device)
        loss = _step(model, optimizer, ids, _rate(phase, step, count))
        bar.set_postfix(phase=phase.name, loss=f"{loss:.3f}", refresh=False)
        if time.monotonic() - saved > save_every or count == len(schedule):
            with atomic_file(state) as partial:
                weights, moments = model.state_dict(), optimizer.state_dict()
                torch.save({"done": count, **record, "model": weights, "optimizer": moments}, partial)
            saved = time.monotonic()


def _rate(phase: Phase, step: int, count: int) -> float:
    """Learning rate of a step: linear within its phase, with a warm-up over the first 50 steps of the run."""
    first, last = phase.rates
    return (first + (last - first) * step / max(1, phase.steps - 1)) * min(1.0, count / 50)


def _step(model: FalconForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor, rate: float) -> float:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _resume(
    state: Path, model: FalconForCausalLM, optimizer: torch.optim.Optimizer, record: Mapping[str, object]
) -> int:
    if not state.exists():
        return 0
    saved: dict[str, Any] = torch.load(state, map_location="cpu", weights_only=True)
    if other := [name for name, value in record.items() if saved.get(name) != value]:
        raise ValueError(f"{state} is of a training with another {' and '.join(other)}: delete it to begin anew")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["done"])


def export(model: FalconForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes the checkpoint in bfloat16, with the files of a published one."""
    model.to("cpu", torch.bfloat16).eval()  # type: ignore[arg-type]  # transformers hides the type of nn.Module.to
    model.generation_config = GenerationConfig(bos_token_id=11, eos_token_id=11, pad_token_id=12)
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def main() -> None:
    """Command line: trains tokenizer and base model and writes them into the package."""
    parser = argparse.ArgumentParser(description="Train Falconet from its generated corpus.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(_tokenizer_texts())
    model = new_model(len(tokenizer))
    text = pack(WORK / "base.jsonl", tokenizer, length=512)
    model.to(arguments.device)  # as in export
    train(model, PHASES, text, WORK / "base.pt", arguments.seed)
    export(model, tokenizer, embedded_directory("falconet"))


def _tokenizer_texts() -> Iterator[str]:
    """The documents for the training of the tokenizer: as many of the base corpus as of the chats."""
    for name in ("base", "chats"):
        with (WORK / f"{name}.jsonl").open(encoding="utf-8") as file:
            for line in islice(file, SIZES["chats"]):
                yield json.loads(line)


if __name__ == "__main__":
    main()
