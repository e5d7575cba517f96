"""Where a checkpoint lies and whether it is whole: embedded, in a directory, or fetched from the hub.

Everything that can be wrong is said before the weights are read: another architecture, a missing or cut-off shard, a
hub that cannot be reached.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import FalconConfig

from falcon_kit.catalogue.hub import fetch_config, hub_errors
from falcon_kit.catalogue.names import adapter_base, adapter_spec, catalogue, embedded_directory, spec
from falcon_kit.catalogue.spec import FalconSpec, config_from_legacy
from falcon_kit.loading.adapters import RECORD, WEIGHTS, weights_file

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_ADAPTER_FILES = ["adapter_config.json", WEIGHTS, RECORD]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found, before its weights are read."""

    directory: Path
    """What holds weights, config and tokenizer."""
    base: FalconSpec
    """The shape of those weights."""
    config: FalconConfig
    """Their config, as today's transformers wants it."""
    spec: FalconSpec
    """The model asked for: the base, or the base with adapters in it."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters to add to the weights, in this order."""

    @property
    def name(self) -> str:
        """The directory by which the same is found again."""
        return str((self.directory, *self.adapters)[-1])


Decide = Callable[[FalconSpec, FalconConfig], None]


def locate(name: str, hub: dict[str, Any], decide: Decide = lambda *_: None) -> Checkpoint:
    """Where the checkpoint lies, downloaded where needed; for an adapter, its base's.

    `decide` is told the spec and the config before weights are fetched, and may raise.
    """
    known = {each.name.lower(): each for each in catalogue()}
    short = name.strip().lower().removeprefix("tiiuae/")
    embedded = short in known and not known[short].published
    if embedded or (short and Path(name).expanduser().is_dir()):
        directory = embedded_directory(short) if embedded else Path(name).expanduser()
        if base := adapter_base(directory):
            return _with_adapter(directory, base, hub, decide, known[short] if embedded else None)
        shape, config = known[short] if embedded else spec(directory), _config(directory)
        decide(shape, config)
        return Checkpoint(directory, shape, config, shape)
    if Path(name).expanduser().is_file():
        raise ValueError(f"{name} is a file: give the folder that holds it, with its config.json and tokenizer")
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no directory {name}: give one that holds a config.json, or a model's name")
    if not short:
        raise LookupError(f"the name is empty: give one of {', '.join(known)}, or a directory")
    if short not in known and "/" not in name:
        spec(name)  # raises, and names the nearest
    repository = f"tiiuae/{known[short].name}" if short in known else name
    return _download(repository, hub, decide)


def _with_adapter(
    adapter: Path, base: str, hub: dict[str, Any], decide: Decide, known: FalconSpec | None = None
) -> Checkpoint:
    """The checkpoint of an adapter's base, and the adapter to add to it. A revision asked for is the adapter's."""
    found = locate(
        base,
        {**hub, "revision": None},
        lambda of_base, config: decide(known or adapter_spec(of_base, adapter), config),
    )
    return replace(found, spec=known or adapter_spec(found.spec, adapter), adapters=(*found.adapters, adapter))


def _download(repository: str, hub: dict[str, Any], decide: Decide) -> Checkpoint:
    """Fetches a hub repository: config first, so that what is no Falcon, or too large, costs no more than that."""
    try:
        config_file = fetch_config(repository, **hub)
    except (ConnectionError, FileNotFoundError):  # an adapter's repository has no config.json, in a cache least of all
        if (adapter := _fetch_adapter(repository, hub)) is None:
            raise
        return _with_adapter(adapter, str(adapter_base(adapter)), hub, decide)
    shape = FalconSpec.from_config(_read(config_file), repository)  # raises for a model that is no Falcon
    config = _config(config_file.parent)
    shape = {f"tiiuae/{each.name}": each for each in catalogue()}.get(repository, shape)
    decide(shape, config)
    with hub_errors(repository):
        directory = Path(snapshot_download(repository, allow_patterns=[*_TEXT_FILES, "*.safetensors"], **hub))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(repository, allow_patterns=[*_TEXT_FILES, "*.bin"], **hub))
    return Checkpoint(directory, shape, config, shape)


def _fetch_adapter(repository: str, hub: dict[str, Any]) -> Path | None:
    """The folder of an adapter on the hub; None where the repository holds none, or cannot be reached."""
    try:
        with hub_errors(repository):
            hf_hub_download(repository, "adapter_config.json", **hub)
    except (ConnectionError, FileNotFoundError):
        return None
    with hub_errors(repository):
        return Path(snapshot_download(repository, allow_patterns=_ADAPTER_FILES, **hub))


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _config(directory: Path) -> FalconConfig:
    """The config as today's transformers wants it, whatever its age."""
    stored = _read(directory / "config.json")
    return FalconConfig.from_dict(stored if stored["model_type"] == "falcon" else config_from_legacy(stored))


def check_weights(found: Checkpoint) -> list[Path]:
    """The weight files of a checkpoint, each complete; those of its adapters are looked at too."""
    for adapter in found.adapters:
        _check_complete(weights_file(adapter))
    directory = found.directory
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = directory / f"{stem}.{suffix}.index.json", directory / f"{stem}.{suffix}"
        if index.is_file():
            files = [directory / file for file in sorted(set(_read(index)["weight_map"].values()))]
        elif single.is_file():
            files = [single]
        else:
            continue
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{directory} lacks {len(missing)} of the {len(files)} shards that {index.name} names: "
                f"{', '.join(missing[:3])}; fetch them again"
            )
        for file in files:
            _check_complete(file)
        return files
    raise FileNotFoundError(
        f"{directory} has a config.json but no weights: expected model.safetensors, pytorch_model.bin, or their index "
        "with its shards"
    )


def _check_complete(file: Path) -> None:
    """Raises ValueError for a file that was cut off. Reads its table of contents, not its tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return
        if zipfile.is_zipfile(file):
            return
        cause = "no end of archive"
    except SafetensorError as error:
        cause = str(error)
    raise ValueError(f"{file} is cut off or damaged ({file.stat().st_size:,} bytes; {cause}): fetch it again")
