"""Settings of fine-tuning, checked, with defaults by the size of the model.

They have the names of peft's `LoraConfig` and transformers' `TrainingArguments` where those have one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_flag, check_whole, is_number, plain_scalar, require, shown, unknown_name
from falcon_kit.display.reading import texts_by_name

TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The four linear layers of a block."""
_SCHEDULES = ("constant_with_warmup", "linear", "cosine")
_TINY, _MIDDLE = 100e6, 20e9  # parameters
_AT_LEAST_1 = ("r", "per_device_train_batch_size", "gradient_accumulation_steps")
_NONE_OR_AT_LEAST_1 = ("context", "max_steps", "eval_steps", "patience", "save_steps")
_ABOVE_0 = ("num_train_epochs", "lora_alpha", "max_grad_norm")
_SHARES = ("held_out", "warmup_ratio", "lora_dropout")
_NAMES = texts_by_name(Path(__file__).with_name("other_names.json"))
_OTHER_NAMES = _NAMES["called"]
_INSTEAD = {name: f"it is called {here}" for name, here in _OTHER_NAMES.items()} | _NAMES["instead"]
"""What to give or do instead of what other trainers take as a setting."""


@documented
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How adapters are trained. `for_model` replaces each None by a value for the size of the model."""

    r: int = 8
    """Rank of the adapter matrices (Hu et al. 2021, arXiv 2106.09685)."""
    lora_alpha: float | None = None
    """The adapter's product is scaled by lora_alpha / r; unset, 4 x r: 32 at r=8, as AWS tuned Falcon-40B."""
    lora_dropout: float | None = None
    """Share of an adapter's inputs set to zero. QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix B.2): 0.1 up to
    13B, 0.05 beyond; Falconet: 0."""
    target_modules: tuple[str, ...] | str = TARGETS
    """Linear layers that get an adapter, or "all-linear", the default. QLoRA found it to matter more than r."""
    learning_rate: float | None = None
    """The highest rate, after warmup. QLoRA, table 9: 2e-4 up to 13B, 1e-4 beyond; Falconet: 5e-3, measured."""
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    """How the rate falls after warmup."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the rate rises from 0 to learning_rate (QLoRA); the last step is never among them."""
    num_train_epochs: float = 3.0
    """Passes over all documents; fractions are possible."""
    max_steps: int | None = None
    """Number of steps; replaces num_train_epochs."""
    per_device_train_batch_size: int = 1
    """Rows in a batch of one process."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are summed for one step."""
    context: int | None = None
    """Tokens in a row, at most; unset, the model's context."""
    packing: bool = True
    """Several documents to a row; no document attends to another."""
    max_grad_norm: float = 1.0
    """Larger gradients are scaled down to this norm."""
    gradient_checkpointing: bool | None = None
    """Store only the inputs of layers and recompute the rest in the backward pass; unset, for all but tiny models."""
    shard: bool | None = None
    """With several processes: each has a shard of the weights (True) or a copy (False); unset, a copy if it fits."""
    held_out: float = 0.05
    """Share of the documents that is not trained on but measured with; 0 measures only what is forgotten."""
    eval_steps: int | None = None
    """Steps between two held-out losses; unset, a tenth of the run."""
    patience: int | None = None
    """Stop after this many evaluations without a lower held-out loss, and return the best adapter."""
    answers: int = 32
    """Held-out conversations whose last answer is generated before and after: for stop rate and exact answers."""
    save_steps: int | None = None
    """Steps between two checkpoints; unset, a tenth of the run. With `patience`, eval_steps is used instead."""
    seed: int = 0
    """On the same machine, the same seed trains the same adapter."""

    def __new__(cls, **settings: Any) -> Self:
        """Raises TypeError for a setting that does not exist, with its name here or the nearest one."""
        names = [each.name for each in fields(cls)]
        for name in (name for name in settings if name not in names):
            if name in _INSTEAD:
                raise TypeError(f"fk.tune has no {name!r}: {_INSTEAD[name]}")
            raise TypeError(unknown_name("setting", name, names))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range, with its name and the range."""
        for field in fields(self):
            object.__setattr__(self, field.name, plain_scalar(getattr(self, field.name)))  # the dataclass is frozen
        self._check_numbers()
        check_flag("packing", self.packing)
        for name in ("gradient_checkpointing", "shard"):
            check_flag(name, getattr(self, name), None)
        kind = self.lr_scheduler_type
        require(kind in _SCHEDULES, f"lr_scheduler_type must be one of {', '.join(_SCHEDULES)}, got {kind!r}")
        self._check_target_modules()
        require(
            self.patience is None or self.held_out > 0, "patience needs the held-out loss: set held_out above 0 too"
        )

    def _check_numbers(self) -> None:
        for name in (*_AT_LEAST_1, *(each for each in _NONE_OR_AT_LEAST_1 if getattr(self, each) is not None)):
            check_whole(name, getattr(self, name), 1)
        check_whole("answers", self.answers, 0)
        check_whole("seed", self.seed, 0, 2**32 - 1)  # numpy's range
        self._check_range(_ABOVE_0, "more than 0, and at most 1e30", lambda value: 0 < value <= 1e30)
        self._check_range(_SHARES, "at least 0 and below 1", lambda value: 0 <= value < 1)
        self._check_range(("learning_rate",), "above 0 and below 1", lambda value: 0 < value < 1)

    def _check_range(self, names: Iterable[str], range: str, holds: Callable[[float], bool]) -> None:
        for name in names:
            value = getattr(self, name)
            valid = value is None or (is_number(value, 0, 1e30) and holds(value))
            require(valid, f"{name} must be {range}, got {shown(value)}")

    def _check_target_modules(self) -> None:
        given: Any = self.target_modules
        if isinstance(given, str):
            given = TARGETS if given == "all-linear" else (given,)
        modules = tuple(given) if isinstance(given, Iterable) else ()
        wrong = [name for name in modules if name not in TARGETS]
        known = ", ".join(TARGETS)
        require(bool(modules) and not wrong, f"target_modules must be among {known}, got {wrong or shown(given)}")
        in_order = tuple(name for name in TARGETS if name in modules)  # a set has another order in each process
        object.__setattr__(self, "target_modules", in_order)

    def for_model(self, spec: FalconSpec) -> "Tuning":
        """The settings with a value in place of each None that has a default for a model of this size."""
        tiny, middle = spec.parameters < _TINY, spec.parameters < _MIDDLE
        by_size: dict[str, Any] = {
            "lora_alpha": 4.0 * self.r,
            "lora_dropout": 0.0 if tiny else 0.1 if middle else 0.05,
            "learning_rate": 5e-3 if tiny else 2e-4 if middle else 1e-4,
            "context": spec.context,
            "gradient_checkpointing": not tiny,
        }
        return replace(self, **{name: value for name, value in by_size.items() if getattr(self, name) is None})
