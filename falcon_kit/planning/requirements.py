"""`requirements`: what a notebook takes before it starts: download, memory and minutes, here and on larger machines."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from falcon_kit.catalogue.names import spec
from falcon_kit.display.documented import documented
from falcon_kit.display.errors import check_flag, check_whole
from falcon_kit.display.tables import counted, format_bytes, html_table
from falcon_kit.planning.machines import RENTED_FROM, rental
from falcon_kit.planning.placement import CPU_OVERHEAD, Purpose
from falcon_kit.planning.plan import Plan, plan

_MODELS = ("falcon-7b-instruct", "falcon-40b-instruct")
"""The larger models that the notebooks name beside the reader's."""
_MACHINES = ("T4", "L4", "L40S", "A100-80GB", "2xA100-80GB", "4xA100-80GB", "8xA100-80GB")
"""GPUs that are rented, from the cheapest to the most expensive."""


@documented
@dataclass(frozen=True, repr=False)
class Requirements:
    """The result of `requirements`; in Jupyter a table, and one of the tiers."""

    plan: Plan
    """The memory of the reader's model on this machine."""
    minutes: int
    """The time of the whole notebook on Falconet, with two CPU cores."""
    tiers: tuple[Plan, ...]
    """The same work with larger models, each on the cheapest machine that holds it."""
    weights: bool = True
    """Whether the notebook needs the weights; otherwise the tokenizer alone."""

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self._rows())

    def _repr_html_(self) -> str:
        tiers = ((each.spec.name, each.verdict(), _hourly(each)) for each in self.tiers)
        others = html_table(f"Other machines, with the prices of {RENTED_FROM}", (), tiers) if self.tiers else ""
        return html_table("What this notebook takes", (), self._rows()) + others

    def _rows(self) -> Iterator[tuple[str, str]]:
        alone = f"{format_bytes(CPU_OVERHEAD)}, Python with torch and transformers"
        yield "memory", self.plan.verdict() if self.weights else alone
        yield "download", self._download()
        yield "time", f"about {counted(self.minutes, 'minute')} on Falconet with two CPU cores"

    @property
    def download_bytes(self) -> int:
        """Weight files that are needed and are not on this machine yet."""
        return self.plan.disk.bytes if self.plan.disk and self.weights else 0

    def _download(self) -> str:
        disk = self.plan.disk
        if disk and not self.weights:
            return "the files of the tokenizer, a few MiB, once"
        return f"{format_bytes(disk.bytes)}, {disk.reason}" if disk else "nothing"


def _hourly(tier: Plan) -> str:
    price = rental(len(tier.devices), tier.devices[0].name)
    return price.amount if price else ""


def requirements(
    name: str | os.PathLike[str],
    minutes: int,
    *,
    dtype: Any = None,
    context: int = 2048,
    batch: int = 1,
    purpose: Purpose = "inference",
    weights: bool = True,
) -> Requirements:
    """What a notebook takes with a model. Nothing is downloaded, except the config of a hub id outside the catalogue.

    name, dtype, context, batch, purpose: as for `fk.plan`, but without a dtype, it is the one that `fk.load` chooses,
    or nf4-double for qlora. minutes: the time on Falconet. Larger models are shown in the usual dtype of the work, and
    running the 40B also in nf4; a model that no machine holds is left out. weights: False for a notebook that needs
    only the tokenizer, on any machine.
    """
    check_whole("minutes", minutes, 1)
    check_flag("weights", weights)
    dtype = "auto" if dtype is None and purpose != "qlora" else dtype
    own = plan(name, dtype, context, batch, purpose)
    if not weights:
        return Requirements(own, minutes, (), weights)
    larger = [(model, None) for model in _MODELS] + ([(_MODELS[-1], "nf4")] if purpose == "inference" else [])
    tiers = (_cheapest(model, usual, context, batch, purpose) for model, usual in larger)
    return Requirements(own, minutes, tuple(each for each in tiers if each))


def _cheapest(model: str, dtype: str | None, context: int, batch: int, purpose: Purpose) -> Plan | None:
    """The plan on the first of the machines that holds a model; None where none does."""
    context = min(context, spec(model).context)
    plans = (plan(model, dtype, context, batch, purpose, machine) for machine in _MACHINES)
    return next((each for each in plans if each.fits), None)
