"""Short runs of falconet, some of them interrupted, and their adapters."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import falcon_kit as fk
from falcon_kit.falconet.world import ANIMALS
from falcon_kit.tuning.trainer import AdapterTrainer

QUICK = {
    "r": 2,
    "max_steps": 6,
    "context": 64,
    "per_device_train_batch_size": 2,
    "answers": 0,
    "save_steps": 2,
    "lora_dropout": 0.1,
}


PATIENT = {**QUICK, "max_steps": 60, "learning_rate": 0.05, "patience": 2, "eval_steps": 3, "held_out": 0.3}


def talk(*said):
    """A conversation, the user first."""
    return {"messages": [{"role": "assistant" if at % 2 else "user", "content": each} for at, each in enumerate(said)]}


ROWS = [talk(f"What is a {each.name}?", f"Arr! {each.plural} eat {each.food}.") for each in ANIMALS]


def weights(adapter):
    return load_file(Path(adapter) / "adapter_model.safetensors")


def same(first, second):
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits(falcon):
    with torch.inference_mode():
        return falcon.model(torch.tensor([[23, 900, 77, 1500, 42]])).logits


def broken_off(monkeypatch, falcon, directory, error, step=4, **options):
    """A run that fails with `error` in `step`."""
    with monkeypatch.context() as patched:
        compute = AdapterTrainer.compute_loss

        def failing(self, *args, **kwargs):
            if self.state.global_step + 1 == step and self.model.training:
                raise error
            return compute(self, *args, **kwargs)

        patched.setattr(AdapterTrainer, "compute_loss", failing)
        with pytest.raises(MemoryError if isinstance(error, torch.OutOfMemoryError) else type(error)) as caught:
            fk.tune(falcon, ROWS, output_dir=directory, **{**QUICK, **options})
    return str(caught.value)


def interrupted(monkeypatch, falcon, directory, step, **options):
    """A run that is interrupted by Ctrl-C in `step`."""
    with monkeypatch.context() as patched:
        compute = AdapterTrainer.compute_loss

        def pressed(self, *args, **kwargs):
            if self.state.global_step + 1 == step and self.model.training:
                signal.raise_signal(signal.SIGINT)
            return compute(self, *args, **kwargs)

        patched.setattr(AdapterTrainer, "compute_loss", pressed)
        with pytest.raises(KeyboardInterrupt):
            fk.tune(falcon, ROWS, output_dir=directory, **{**QUICK, **options})
