"""LoRA on a CPU: the kit beside TRL's SFTTrainer (padded, and its packing) and a plain Trainer.

All train a random Falcon with the 65,024 tokens of the published models on the same conversations for one epoch, with
the same adapters and learning rate. The lengths are distributed like Baize's (mean about 300 tokens, at most 2048).
Each contestant runs in a separate process, because its memory is measured, and they alternate. With packing, an epoch
has more steps (one row each) than with padding (eight conversations each), so held-out losses differ. TRL is installed
by the extra "bench".
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from transformers import DataCollatorForSeq2Seq, FalconConfig, FalconForCausalLM, Trainer, TrainingArguments

import falcon_kit as fk
from benchmarks import CannotRun
from falcon_kit.falconet.corpus import base_document
from falcon_kit.model import modeling

ROUNDS = 3
CONVERSATIONS, HELD_OUT = 16, 8
SIZES = {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_kv_heads": 2, "vocab_size": 65024}
RANK, RATE, CONTEXT, ROWS = 8, 2e-3, 2048, 8
CONTESTANTS = ("kit", "SFTTrainer", "SFTTrainer, packing", "Trainer")


def run() -> dict[str, Any]:
    """Medians of the rounds: trained tokens per second, memory, and held-out loss after one epoch."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise CannotRun("TRL is not installed: pip install trl") from error
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(ROUNDS):
        for name in CONTESTANTS:
            rounds[name].append(_in_a_process(name))
            print(name, rounds[name][-1], flush=True)
    medians = {
        name: {key: round(statistics.median(each[key] for each in taken), 4) for key in taken[0]}
        for name, taken in rounds.items()
    }
    kit = medians["kit"]
    return {
        "model": f"random, {SIZES}, float32, LoRA of rank {RANK} on all four linear layers, gradient checkpointing",
        "data": f"{CONVERSATIONS} conversations, {kit['tokens']:,.0f} tokens, at most {CONTEXT} each; one epoch",
        "rounds": ROUNDS,
        "medians": medians,
        "kit's tokens/s, as a ratio": _ratios(medians, "tokens per second", lambda own, other: own / other),
        "kit's memory, as a ratio": _ratios(medians, "peak MiB above the start", lambda own, other: own / other),
        "kit's held-out loss, difference": _ratios(medians, "held-out loss", lambda own, other: own - other),
    }


def _ratios(
    medians: Mapping[str, Mapping[str, float]], key: str, how: Callable[[float, float], float]
) -> dict[str, float]:
    own = medians["kit"][key]
    return {name: round(how(own, each[key]), 3) for name, each in medians.items() if name != "kit"}


def _in_a_process(name: str) -> dict[str, float]:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.tuning", name], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise RuntimeError(f"{name} failed:\n{finished.stderr[-3000:]}")
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    return result


def conversations(count: int, seed: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Conversations whose lengths are spread like Baize's: log-normal, mean about 300 tokens, none over the context."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        wanted, messages, length = min(CONTEXT - 400, int(rng.lognormvariate(5.35, 0.85))), [], 0
        while length < wanted:
            question, reply = (base_document(rng)[:size] for size in (120, 600))
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            length += len(tokenizer(question + reply)["input_ids"]) + 8
        rows.append({"messages": messages})
    return rows


def measure(name: str) -> dict[str, float]:
    """One contestant, in this process."""
    falcon = fk.load("falconet")
    train, test = (conversations(count, seed, falcon.tokenizer) for seed, count in enumerate((CONVERSATIONS, HELD_OUT)))
    packed = fk.pack(fk.dialogues(train), falcon, CONTEXT)
    torch.manual_seed(0)
    kind = modeling.FalconForCausalLM if name == "kit" else FalconForCausalLM
    model = kind(FalconConfig(**SIZES, new_decoder_architecture=True, bos_token_id=11, eos_token_id=11))
    with tempfile.TemporaryDirectory() as folder, _Memory() as memory:
        trained, seconds = TRAIN[name.partition(",")[0]](model, falcon, train, Path(folder), name.endswith("packing"))
    return {
        "tokens": packed.tokens,
        "seconds": seconds,
        "tokens per second": packed.tokens / seconds,
        "peak MiB above the start": memory.peak / 2**20,
        "held-out loss": _loss(trained, fk.pack(fk.dialogues(test), falcon, CONTEXT, together=False)),
    }


def _kit(model: Any, falcon: Any, rows: list[Any], folder: Path, packing: bool) -> tuple[Any, float]:
    """fk.tune with packing, timed from documents to the saved adapter; the others are timed in `train()` only."""
    from dataclasses import replace

    own = replace(falcon, model=model.eval(), spec=fk.FalconSpec.from_config(model.config.to_dict(), "random"))
    options: dict[str, Any] = {"held_out": 0, "num_train_epochs": 1, "save_steps": 10_000, "quiet": True}
    options |= {"r": RANK, "lora_alpha": 32, "lora_dropout": 0, "gradient_checkpointing": True}
    options |= {"learning_rate": RATE, "lr_scheduler_type": "linear", "warmup_ratio": 0}
    start = time.perf_counter()
    run = fk.tune(own, rows, output_dir=folder, **options)
    seconds = time.perf_counter() - start
    return fk.merge(run.adapter, own).model, seconds


def _arguments(folder: Path, batch: int, accumulate: int) -> dict[str, Any]:
    """Arguments of the other trainers."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=32, target_modules=list(fk.Tuning().target_modules), task_type="CAUSAL_LM")


def _sft(model: Any, falcon: Any, rows: list[Any], folder: Path, packing: bool) -> tuple[Any, float]:
    """TRL with its defaults (8 rows, gradient checkpointing), except for the length and labels on answers only."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    batch = 1 if packing else ROWS
    options = _arguments(folder, batch, 1) | {"max_length": CONTEXT, "packing": packing, "assistant_only_loss": True}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=falcon.tokenizer,
        peft_config=_lora(),
    )
    start = time.perf_counter()
    trainer.train()
    return trainer.model, time.perf_counter() - start


def _trainer(model: Any, falcon: Any, rows: list[Any], folder: Path, packing: bool) -> tuple[Any, float]:
    """transformers' Trainer with padding; in batches of two rows, since the logits of eight would take 13 GB."""
    from peft import get_peft_model

    packed = fk.pack(fk.dialogues(rows), falcon, CONTEXT, together=False)
    examples = [
        {"input_ids": packed[index]["input_ids"].tolist(), "labels": packed[index]["labels"].tolist()}
        for index in range(len(packed))
    ]
    adapted = get_peft_model(model, _lora())
    adapted.enable_input_require_grads()
    options = _arguments(folder, 2, ROWS // 2) | {"activation_checkpointing": True}
    collator = DataCollatorForSeq2Seq(falcon.tokenizer)
    data: Any = examples
    trainer = Trainer(adapted, TrainingArguments(**options), train_dataset=data, data_collator=collator)
    start = time.perf_counter()
    trainer.train()
    return adapted, time.perf_counter() - start


TRAIN: Mapping[str, Callable[..., Any]] = {"kit": _kit, "SFTTrainer": _sft, "Trainer": _trainer}


def _loss(model: Any, packed: fk.Packed) -> float:
    """Mean loss per trained token of the held-out conversations, one conversation at a time."""
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for row in (packed[index] for index in range(len(packed))):
            ids, labels = (torch.from_numpy(row[name])[None].long() for name in ("input_ids", "labels"))
            number = int((labels[:, 1:] >= 0).sum())
            total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * number
            count += number
    return total / count


class _Memory:
    """The peak memory of this process above its memory at the start, in bytes; sampled every 5 ms."""

    def __enter__(self) -> "_Memory":
        self.peak, self._over = 0, threading.Event()
        self._start = psutil.Process().memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.005):
            self.peak = max(self.peak, process.memory_info().rss - self._start)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def draw(figures: Mapping[str, Any]) -> Figure:
    """Tokens per second and memory, a bar for each."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    colours = ("#0072B2", "#E69F00", "#009E73", "#D55E00")  # Okabe and Ito's
    names = list(figures["medians"])
    for axes, key in zip(panels, ("tokens per second", "peak MiB above the start", "held-out loss"), strict=True):
        axes.barh(names, [figures["medians"][name][key] for name in names], color=colours)
        axes.set_xlabel(key)
    panels[0].invert_yaxis()
    figure.suptitle(f"LoRA on the same conversations: {figures['data']}", fontsize=10)
    return figure


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
