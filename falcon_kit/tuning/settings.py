"""Settings of fine-tuning, checked, with defaults by the size of the model."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import require, unknown_name

TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The four linear layers of a block."""
_TINY, _MIDDLE = 100e6, 20e9  # parameters


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How adapters are trained. What is None takes a value by the size of the model, see `for_model`."""

    rank: int = 8
    """Columns of the adapter matrices (Hu et al. 2021, arXiv 2106.09685)."""
    alpha: float | None = None
    """The adapter's product is scaled by alpha / rank; unset, 4 x rank: 32 at rank 8, as AWS tuned Falcon-40B."""
    dropout: float | None = None
    """Share of an adapter's inputs set to zero. QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix B.2): 0.1 up to
    13B, 0.05 beyond; Falconet: 0."""
    targets: tuple[str, ...] = TARGETS
    """Linear layers that get an adapter: all of them, which QLoRA found to matter more than rank."""
    learning_rate: float | None = None
    """At its highest. QLoRA, table 9: 2e-4 up to 13B, 1e-4 beyond; Falconet: 5e-3, measured."""
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "cosine"
    """How the rate falls."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises to its highest (QLoRA)."""
    epochs: float = 3.0
    """Times that all documents are seen; parts of one are possible."""
    max_steps: int | None = None
    """Steps, in place of epochs."""
    batch: int = 1
    """Rows at once in each process."""
    accumulate: int = 1
    """Batches whose gradients are added up to one step."""
    context: int | None = None
    """Tokens in a row; unset, the model's context."""
    packing: bool = True
    """Several documents to a row; they do not see each other."""
    max_grad_norm: float = 1.0
    """Larger gradients are scaled down to this norm."""
    checkpointing: bool | None = None
    """Keep only what comes into each layer and compute the rest anew; unset, for all but tiny models."""
    shard: bool | None = None
    """In several processes: a part of the weights in each (True) or a copy (False); unset, parts if no copy fits."""
    held_out: float = 0.05
    """Share of the documents that is not trained on, to measure with; 0 measures nothing."""
    evaluate_every: int | None = None
    """Steps from one held-out loss to the next; unset, ten times a run."""
    patience: int | None = None
    """Stop once the held-out loss has not fallen for so many evaluations, and take the best adapter."""
    answers: int = 32
    """Held-out conversations whose last answer is written before and after, to measure stop rate and exact answers."""
    save_every: int | None = None
    """Steps from one checkpoint to the next; unset, ten times a run. With `patience` as often as it is evaluated."""
    seed: int = 0
    """Same seed, same adapter, on the same machine."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range, naming it and the range."""
        for name in ("rank", "batch", "accumulate"):
            require(_whole(getattr(self, name), 1), f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("max_steps", "evaluate_every", "patience", "save_every"):
            value = getattr(self, name)
            require(value is None or _whole(value, 1), f"{name} must be at least 1, got {value!r}")
        require(_whole(self.answers, 0), f"answers must be 0 or more, got {self.answers!r}")
        require(self.epochs > 0, f"epochs must be more than 0, got {self.epochs}")
        require(0 <= self.held_out < 1, f"held_out must be at least 0 and below 1, got {self.held_out}")
        require(0 <= self.warmup < 1, f"warmup must be at least 0 and below 1, got {self.warmup}")
        require(self.alpha is None or self.alpha > 0, f"alpha must be more than 0, got {self.alpha}")
        require(
            self.learning_rate is None or 0 < self.learning_rate < 1,
            f"learning_rate must be above 0 and below 1, got {self.learning_rate}",
        )
        require(
            self.dropout is None or 0 <= self.dropout < 1, f"dropout must be at least 0 and below 1, got {self.dropout}"
        )
        known = ("constant_with_warmup", "linear", "cosine")
        require(self.schedule in known, f"schedule must be one of {', '.join(known)}, got {self.schedule!r}")
        wrong = [name for name in self.targets if name not in TARGETS]
        require(
            bool(self.targets) and not wrong, f"targets must be among {', '.join(TARGETS)}, got {wrong or self.targets}"
        )
        require(
            self.patience is None or self.held_out > 0, "patience watches the held-out loss: set held_out above 0 too"
        )

    @classmethod
    def named(cls, settings: dict[str, Any]) -> "Tuning":
        """Settings by name; TypeError for an unknown one, with the nearest."""
        names = [each.name for each in fields(cls)]
        for name in settings:
            if name not in names:
                raise TypeError(unknown_name("setting", name, names))
        return cls(**settings)

    def for_model(self, spec: FalconSpec) -> "Tuning":
        """The settings with a value in place of each None that has a default for a model of this size."""
        tiny, middle = spec.parameters < _TINY, spec.parameters < _MIDDLE
        by_size: dict[str, Any] = {
            "alpha": 4.0 * self.rank,
            "dropout": 0.0 if tiny else 0.1 if middle else 0.05,
            "learning_rate": 5e-3 if tiny else 2e-4 if middle else 1e-4,
            "context": spec.context,
            "checkpointing": not tiny,
        }
        return replace(self, **{name: value for name, value in by_size.items() if getattr(self, name) is None})


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
