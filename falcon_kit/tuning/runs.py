"""The result of a run: its adapter, losses, answers before and after, and model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_kit.display.documented import documented
from falcon_kit.display.errors import printable
from falcon_kit.display.page import Page
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.merging import attached
from falcon_kit.planning.plan import Plan
from falcon_kit.tuning.data import dialogues
from falcon_kit.tuning.measure import answer_rates
from falcon_kit.tuning.packing import Packed
from falcon_kit.tuning.plots import loss_curve
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@documented
@dataclass(frozen=True, repr=False)
class TuningRun:
    """A finished run: its adapter, settings, losses, and what was measured before and after."""

    adapter: Path
    """The folder of the adapter, in the format of PEFT."""
    falcon: Falcon
    """The model it was trained on, without the adapter."""
    settings: Tuning
    plan: Plan
    packed: Packed
    """The rows it was trained on."""
    history: tuple[Mapping[str, float], ...]
    """The log: the loss of each step, and every `eval_steps` the held-out loss."""
    figures: Mapping[str, float]
    """Measured before and after the run: the loss on 8 generated texts, or on `web_text`, which shows what is
    forgotten, and on held-out documents loss, stop rate, exact answers."""

    @property
    def verdict(self) -> str:
        """What the run learned and forgot, and which setting to change if it learned nothing or forgot too much."""
        return verdict(self.history, self.figures, self.settings, len(self.packed.lengths))

    def plot(self) -> Figure:
        """The loss over the steps."""
        return loss_curve(self.history, f"Tuning {self.falcon.spec.name}, r={self.settings.r}")

    figure = plot

    def to_dataframe(self) -> pd.DataFrame:
        """The history as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(list(self.history))

    def before_after(self, prompts: str | Sequence[str], max_new_tokens: int = 64, **settings: Any) -> BeforeAfter:
        """The model's answer to each prompt without and with the adapter; greedy, unless `settings` sample."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        samples = settings.keys() & {"do_sample", "temperature", "top_k", "top_p"}
        options: Any = {"max_new_tokens": max_new_tokens, **({} if samples else {"do_sample": False}), **settings}

        def answers() -> list[str]:
            return [str(self.falcon.chat([{"role": "user", "content": each}], **options)) for each in prompts]

        before = answers()
        with attached(self.falcon, self.adapter):
            after = answers()
        return BeforeAfter(tuple(zip(prompts, before, after, strict=True)))

    def rates(self, documents: Any, count: int = 32) -> dict[str, float]:
        """Stop rate and exact answers of the tuned model, each from 0 to 1.

        documents: as for `fk.dialogues`; the last answer of the first `count` conversations is generated, greedily. On
        the rows of the run, this shows whether it answers from them.
        """
        with attached(self.falcon, self.adapter):
            return answer_rates(self.falcon, dialogues(documents), count, self.settings.context or 0)

    def _facts(self) -> dict[str, str]:
        size = sum(file.stat().st_size for file in self.adapter.iterdir())
        facts = {
            "adapter": f"{self.adapter} ({format_bytes(size)})",
            "base": self.falcon.name,
            "data": repr(self.packed),
            "steps": str(max((int(each["step"]) for each in self.history if "step" in each), default=0)),
        }
        return facts | {name: f"{value:.4g}" for name, value in self.figures.items()} | {"verdict": self.verdict}

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())
        return printable(f"TuningRun({self.falcon.name}, r={self.settings.r}; {figures}; {self.adapter})")

    def _repr_html_(self) -> str:
        return html_table(f"Tuned {printable(self.falcon.name)}", (), self._facts().items())


@dataclass(frozen=True, repr=False)
class BeforeAfter:
    """Answers without and with an adapter; a table in Jupyter."""

    rows: tuple[tuple[str, str, str], ...]
    """Prompt, answer before, answer after."""

    def __repr__(self) -> str:
        rows = ((printable(prompt, keep="\n"), before, after) for prompt, before, after in self.rows)
        return "\n\n".join(f"{prompt}\n  before: {before!r}\n  after:  {after!r}" for prompt, before, after in rows)

    def _repr_html_(self) -> str:
        return self._table("Before and after")

    def _table(self, title: str) -> str:
        return html_table(title, ("prompt", "before", "after"), self.rows)

    def to_html(self, path: str | Path) -> Path:
        """Writes the table as an HTML page; returns its path."""
        return Page("Before and after", self._table("Answers without and with the adapter")).write(path)


def model_card(run: TuningRun) -> str:
    """The model card of an adapter: data, figures, settings."""
    form, given = run.packed.chat_format, "web-text loss after" in run.figures
    measured = [f"| {label} | {value:.4g} |" for label, value in run.figures.items()]
    chosen = [f"| {label} | {value} |" for label, value in asdict(run.settings).items()]
    return _CARD.format(
        base=run.falcon.name,
        name=run.adapter.parent.resolve().name,
        adapter=run.adapter.as_posix(),
        form=f"{form.name}, `{form.user_prefix}` / `{form.assistant_prefix}`" if form.assistant_prefix else form.name,
        data=repr(run.packed).removeprefix("Packed(").removesuffix(")"),
        figures="\n".join([*_HEAD, *measured]),
        text="web-text" if given else "generated-text",
        texts="the web text that was given" if given else "8 generated English texts about animals",
        settings="\n".join([*_HEAD, *chosen]),
    )


_HEAD = ("| | |", "|---|---|")
_CARD = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
