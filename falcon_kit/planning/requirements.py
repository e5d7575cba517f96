"""`requirements`: what a notebook takes before it starts: download, memory and minutes, here and on larger machines."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from falcon_kit.display.errors import check_whole
from falcon_kit.display.tables import format_bytes, html_table
from falcon_kit.planning.machines import RENTED_FROM, rental
from falcon_kit.planning.plan import Plan, plan

_TIERS = (
    ("falcon-7b-instruct", "bfloat16", "T4"),
    ("falcon-7b-instruct", "bfloat16", "L4"),
    ("falcon-40b-instruct", "bfloat16", "2xA100-80GB"),
    ("falcon-40b-instruct", "nf4", "L40S"),
)
"""Model, dtype and devices of the machines that the notebooks name beside the reader's."""


@dataclass(frozen=True, repr=False)
class Requirements:
    """The result of `requirements`; two tables in Jupyter."""

    plan: Plan
    """The memory of the reader's model on this machine."""
    minutes: int
    """The time of the whole notebook on Falconet, with two CPU cores."""
    tiers: tuple[Plan, ...]
    """The same work with larger models on machines that hold them."""

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {text}" for name, text in self._rows())

    def _repr_html_(self) -> str:
        tiers = ((each.spec.name, each.verdict(), _hourly(each)) for each in self.tiers)
        others = html_table(f"Other machines, with the prices of {RENTED_FROM}", (), tiers)
        return html_table("What this notebook takes", (), self._rows()) + others

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "memory", self.plan.verdict()
        yield "download", self._download()
        yield "time", f"about {self.minutes} minutes on Falconet with two CPU cores"

    @property
    def download_bytes(self) -> int:
        """Weight files that are not on this machine yet."""
        return self.plan.disk.bytes if self.plan.disk else 0

    def _download(self) -> str:
        if self.plan.disk is None or not self.download_bytes:
            return "nothing"
        return f"{format_bytes(self.download_bytes)}, {self.plan.disk.reason}"


def _hourly(tier: Plan) -> str:
    price = rental(len(tier.devices), tier.devices[0].name)
    return f"about ${price.usd_per_hour:.2f}/h" if price else ""


def requirements(name: str | os.PathLike[str], minutes: int, **arguments: Any) -> Requirements:
    """What a notebook takes with a model. Nothing is downloaded, except the config of a hub id outside the catalogue.

    name: as for `fk.plan`. minutes: the time on Falconet. arguments: of `fk.plan`, such as purpose="qlora".
    """
    check_whole("minutes", minutes, 1)
    tiers = tuple(plan(model, devices=devices, **{**arguments, "dtype": dtype}) for model, dtype, devices in _TIERS)
    return Requirements(plan(name, **arguments), minutes, tiers)
