"""What a run of tuning gave: the adapter, the curve, what it says before and after, and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.generation.chat import ChatFormat
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.merging import attached
from falcon_kit.planning.plan import Plan
from falcon_kit.tuning.packing import Packed
from falcon_kit.tuning.plots import loss_curve
from falcon_kit.tuning.settings import Tuning

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class TuningRun:
    """A finished run: the adapter, how it came about, and what it changed."""

    adapter: Path
    """The folder with the adapter, as PEFT saves it."""
    falcon: Falcon
    """The model it was made for, as it was before."""
    settings: Tuning
    """How it was trained."""
    plan: Plan
    """What that was to take."""
    packed: Packed
    """What it was trained on."""
    history: tuple[Mapping[str, float], ...]
    """What was logged: at each step the loss, now and then the held-out loss."""
    figures: Mapping[str, float]
    """Measured on held-out documents, before and after: loss, and shares of answers that stop and that are exact."""

    def plot(self) -> Figure:
        """The loss, step by step."""
        return curve(self.history, f"Tuning {self.falcon.spec.name}, rank {self.settings.rank}")

    figure = plot

    def to_dataframe(self) -> Any:
        """The history as a pandas DataFrame."""
        import pandas as pd  # type: ignore[import-untyped]  # brings no types

        return pd.DataFrame(list(self.history))

    def before_after(self, prompts: str | Sequence[str], max_new_tokens: int = 64, **settings: Any) -> BeforeAfter:
        """What the model says to each prompt without and with the adapter, greedily unless `settings` draw."""
        asked = [prompts] if isinstance(prompts, str) else list(prompts)

        def answers() -> list[str]:
            said = (self.falcon.chat([{"role": "user", "content": each}], **options) for each in asked)
            return [str(each) for each in said]

        options: Any = {"max_new_tokens": max_new_tokens, **settings}
        before = answers()
        with attached(self.falcon, self.adapter):
            after = answers()
        return BeforeAfter(tuple(zip(asked, before, after, strict=True)))

    def _facts(self) -> dict[str, str]:
        size = sum(file.stat().st_size for file in self.adapter.iterdir())
        facts = {
            "adapter": f"{self.adapter} ({format_bytes(size)})",
            "base": self.falcon.name,
            "data": repr(self.packed),
            "steps": str(max((int(each["step"]) for each in self.history if "step" in each), default=0)),
        }
        return facts | {name: f"{value:.4g}" for name, value in self.figures.items()}

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return f"TuningRun({self.falcon.name}, rank {self.settings.rank}; {figures}; {self.adapter})"

    def _repr_html_(self) -> str:
        return html_table(f"Tuned {self.falcon.name}", (), self._facts().items())


@dataclass(frozen=True, repr=False)
class BeforeAfter:
    """Answers without and with an adapter; a table in Jupyter."""

    rows: tuple[tuple[str, str, str], ...]
    """Prompt, answer before, answer after."""

    def __repr__(self) -> str:
        return "\n\n".join(
            f"{prompt}\n  before: {before!r}\n  after:  {after!r}" for prompt, before, after in self.rows
        )

    def _repr_html_(self) -> str:
        return html_table("Before and after", ("prompt", "before", "after"), self.rows)

    def to_html(self, path: str | Path) -> Path:
        """Writes the table as a page of its own."""
        Path(path).write_text(f"<!doctype html><meta charset=utf-8>{self._repr_html_()}", encoding="utf-8")
        return Path(path)


def curve(logged: Sequence[Mapping[str, float]], title: str) -> Figure:
    """The losses of a history, drawn."""
    trained, held_out = (
        [(each["step"], each[name]) for each in logged if name in each] for name in ("loss", "eval_loss")
    )
    return loss_curve(trained, held_out, title)


def card(base: str, name: str, form: ChatFormat, packed: Packed, chosen: Tuning, figures: Mapping[str, float]) -> str:
    """An adapter's model card: data, settings, figures."""
    measured = [f"| {label} | {value:.4g} |" for label, value in figures.items()]
    settings = [f"| {label} | {value} |" for label, value in asdict(chosen).items()]
    return _CARD.format(
        base=base,
        name=name,
        form=form,
        data=repr(packed).removeprefix("Packed(").removesuffix(")"),
        figures="\n".join([*_HEAD, *measured]) if measured else "Nothing was held out to measure with.",
        settings="\n".join([*_HEAD, *settings]),
    )


_HEAD = ("| | |", "|---|---|")
_CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [falcon, lora]
---
# {name}

A LoRA adapter for `{base}`, trained with Falcon Kit. Chat format: `{form.user_prefix}` / `{form.assistant_prefix}`.

    falcon = fk.merge("{name}/adapter", "{base}")

## Data

{data}.

## Measured

{figures}

Held-out documents, greedy answers without stop strings: "stop rate" is the share that ends with the end token.

## Settings

{settings}
"""
