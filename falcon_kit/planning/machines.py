"""GPUs, machines of clouds, prices and published reports, from devices.json, and the words that people use for them."""

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.names import catalogue
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import unknown_name

MIB, GIB = 2**20, 2**30
_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("devices.json").read_text(encoding="utf-8"))
GPUS: dict[str, int] = {name: int(gpu["gib"] * 1024) * MIB for name, gpu in _DATA["gpus"].items()}
"""Bytes that torch can allocate, from the "total capacity" in published out-of-memory errors, or the same figure of
another CUDA program; it is 0.5 to 5 percent less than nvidia-smi prints. Of several published figures, the smallest
that was found. The source of each is in devices.json; null where the errors are in public files without a lasting
address."""
_NOISE = re.compile(
    r"\b(?:standard|nvidia|amd|instinct|tesla|geforce|rtx)+|\b(?:sxm\d?|pcie|hbm\d?e?|gpus?)\b"
    r"|\b(?:generation|blackwell|max q|workstation|server|edition)\b"
)
"""Words in names that tell no two cards or machines apart."""


@dataclass(frozen=True)
class Price:
    """What one hour of a machine costs on demand, as one source published it."""

    offer: str
    """What is sold at this price: the service, or the instance of EC2 that SageMaker's type is named after."""
    usd_per_hour: float
    as_of: str
    """The day or the year of the source."""
    source: str

    @property
    def amount(self) -> str:
        """The price alone."""
        return f"about ${self.usd_per_hour:.2f}/h"

    def __str__(self) -> str:
        return f"{self.amount} {'on' if '-' in self.as_of else 'in'} {self.as_of} ({self.offer})"


_PRICES = {name: Price(**each) for name, each in _DATA["prices"].items()}
"""By the name of the machine; one without a dated source has none."""
_RENTALS: dict[str, Any] = _DATA["rentals"]
"""The prices of one service for GPUs by kind and number; the lower one where it offers those of two clouds."""
RENTED_FROM = f"{_RENTALS['offer']} on {_RENTALS['as_of']}"
"""The service of `rental`, with the day on which its prices were read."""


def rental(count: int, gpu: str) -> Price | None:
    """What `count` GPUs of a kind of `GPUS` cost where a service lists them; None for others."""
    usd = _RENTALS["usd_per_hour"].get(gpu, {}).get(str(count))
    return None if usd is None else Price(_RENTALS["offer"], usd, _RENTALS["as_of"], _RENTALS["source"])


@dataclass(frozen=True)
class Machine:
    """An instance type of a cloud, or a runtime of a notebook service."""

    name: str
    """The name there; AWS's types with "ml.", as in SageMaker; with "+T4" or "+2xT4" where GPUs are attached to one."""
    provider: str
    """AWS, Google Cloud, Azure, Colab or Kaggle."""
    count: int
    gpu: str
    """Their kind, a key of `GPUS`."""
    host_bytes: int | None
    """Its published host memory; None where no figure was found."""
    price: Price | None = None
    """Its published price; None where no dated source was found."""

    @property
    def gpu_bytes(self) -> int:
        """Memory of all its GPUs together."""
        return self.count * GPUS[self.gpu]


MACHINES = {
    name: Machine(name, provider, count, gpu, None if host is None else int(host * GIB), _PRICES.get(name))
    for provider, group in _DATA["machines"].items()
    for name, (count, gpu, host) in group["types"].items()
}
"""By name. The sources of each provider's figures are in devices.json."""


def machines_of(provider: str) -> list[Machine]:
    """A provider's machines, the one with the least GPU memory first."""
    return sorted((each for each in MACHINES.values() if each.provider == provider), key=lambda each: each.gpu_bytes)


def find_machine(words: str) -> Machine | None:
    """The machine that words name: "ml.g5.12xlarge", "g5.12xlarge", "Colab T4", "nc24ads-a100-v4"."""
    typed = _squeeze(words)
    names = {_squeeze(name): each for name, each in MACHINES.items()}
    return names.get(typed) or names.get(f"ml.{typed}")


def find_gpu(words: str) -> str | None:
    """The key of `GPUS` that words name: "H100", "NVIDIA A100-SXM4-80GB", "RTX 4090", "a100 80g".

    Without a size, the smaller of two: the device is shown under the name with the size.
    """
    typed = re.sub(r"gb$|(?<=\d{5})g$", "", _squeeze(words))  # five digits: A100 and 80, not A10G
    names = {name: _squeeze(name).removesuffix("gb") for name in GPUS}
    without_size = {name: _squeeze(re.sub(r"-\d+GB$", "", name)) for name in GPUS}
    same = [name for name in GPUS if typed in (names[name], without_size[name])]
    return min(same, key=GPUS.__getitem__, default=None)


def count_and_kind(words: str) -> tuple[int, str]:
    """The number of devices and their kind: 8 and "h100" for "8xH100", "8 x H100", "8 H100s" and "H100 x 8"."""
    word = words.strip().lower()
    kind_first = r"(.+)(?:(?<=[\dbgs\s])x|[*×])\s*(\d+)"  # an x right after another letter may be the kind's own
    if match := re.fullmatch(rf"(\d+)\s*[x*×]\s*(.+)|{kind_first}|(\d+)\s+([a-z].+)", word):
        before, kind, first_kind, after, plain, plain_kind = match.groups()
        return int(before or after or plain), (kind or first_kind or plain_kind).strip()
    return 1, word


def unknown_device(words: str) -> str:
    """The error text for words that name neither a GPU, a machine nor a size."""
    near = get_close_matches(words.strip().lower(), [each.lower() for each in MACHINES], cutoff=0.55)
    known = [*GPUS, *(each for each in MACHINES if each.lower() in near)]
    return (
        f"{unknown_name('devices', words, known)} Or give a machine of {', '.join(_DATA['machines'])}, such as "
        "'ml.g5.12xlarge', or a size, such as '4x40GiB'."
    )


def _squeeze(words: str) -> str:
    """Words without the maker, the form of the card, spaces and signs; a point stays, as in "g5.xlarge"."""
    plain = re.sub(r"[^a-z0-9.]", " ", words.lower())
    return _NOISE.sub("", plain).replace(" ", "")


def published_report(shape: FalconSpec, dtype: str) -> tuple[int, str] | None:
    """The bytes that a published measurement found for a model of this size in this dtype, and its source."""
    sizes = {each.name: each.parameters for each in catalogue()}
    for each in _DATA["reports"]:
        if dtype in each["dtypes"] and sizes[each["model"]] == shape.parameters:
            return each["gb"] * 10**9, each["source"]
    return None
