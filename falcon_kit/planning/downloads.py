"""The disk that the files of a model of the hub need.

Neither torch nor transformers is imported, and nothing is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path

from falcon_kit.catalogue.names import catalogue
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.tables import format_bytes
from falcon_kit.planning.environment import cache_directory, free_disk


@dataclass(frozen=True)
class Disk:
    """The files of a model that are still to be downloaded, and the disk of huggingface_hub's cache."""

    bytes: int
    """The files that the cache lacks, at the size of the published bfloat16 files."""
    free_bytes: int | None
    """Free bytes at the cache; None for a machine other than this one."""
    cache_dir: str | Path | None = None
    """The cache, where it is not the one that HF_HOME names."""

    @property
    def reason(self) -> str:
        """The row of a plan in words."""
        if self.free_bytes is None:
            return "once, to the disk of the machine"
        place = f"of {self.cache_dir}" if self.cache_dir else "that HF_HOME names"
        return f"once, to the disk {place}: {format_bytes(self.free_bytes)} free"

    @property
    def shortage(self) -> str:
        """What the disk lacks, and the way out; empty where it has room, or where it is not known."""
        if self.free_bytes is None or self.bytes <= self.free_bytes:
            return ""
        return disk_shortage(self.bytes, self.free_bytes, self.cache_dir)


def disk_shortage(needed: int, free: int, cache_dir: str | Path | None) -> str:
    """The text about a disk that is too small for a download. cache_dir: as in huggingface_hub."""
    place, advice = "the cache of huggingface_hub", "set HF_HOME to a folder on a larger disk before Python starts"
    if cache_dir:
        place, advice = f"cache_dir={str(cache_dir)!r}", "give a folder on a larger disk"
    return f"Its files take {format_bytes(needed)} of disk, and {format_bytes(free)} are free in {place}: {advice}"


def disk_for(shape: FalconSpec, here: bool, cache_dir: str | Path | None = None) -> Disk | None:
    """The disk that a model of the hub needs: here, without the files in the cache; None if it needs no file."""
    repository = _repository(shape)
    if repository is None:
        return None
    if not here:
        return Disk(shape.stored_bytes, None)
    cache = Path(cache_dir or cache_directory())
    missing = shape.stored_bytes - _cached(cache, repository)
    return Disk(missing, free_disk(cache), cache_dir) if missing > 0 else None


def _repository(shape: FalconSpec) -> str | None:
    """The repository of the hub with the weights, which for an adapter there is that of its base; else None."""
    if shape.published or not (shape.hub_id and shape.fine_tuned_from):
        return shape.hub_id
    known = {each.name: each.hub_id for each in catalogue()}
    return known.get(shape.fine_tuned_from, shape.fine_tuned_from)


def _cached(cache: Path, repository: str) -> int:
    """Bytes of the weight files in the fullest snapshot of a repository; a link to a file that is gone is none."""
    snapshots = (cache / f"models--{repository.replace('/', '--')}" / "snapshots").glob("*")
    files = ([*each.glob("*.safetensors")] or [*each.glob("*.bin")] for each in snapshots)
    return max((sum(file.stat().st_size for file in found if file.exists()) for found in files), default=0)
