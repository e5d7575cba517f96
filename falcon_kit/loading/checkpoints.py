"""A checkpoint found by name, fetched from the hub and checked: embedded, in a directory, or in a hub repository.

Every error comes before the weights are read: another architecture, a missing or cut-off shard, an unreachable hub.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """A checkpoint, with the adapters to add to it. Its weights may still have to be fetched."""

    directory: Path
    """The folder of weights, config and tokenizer; for a hub repository its snapshot in the cache."""
    base: FalconSpec
    """The shape of those weights."""
    config: FalconConfig
    """Their config, in the form that this version of transformers reads."""
    spec: FalconSpec
    """The model asked for: the base, or the base with adapters."""
    adapters: tuple[Path, ...] = ()
    """The folders of the adapters, in the order in which they are added to the weights."""
    repositories: Mapping[Path, str] = field(default_factory=dict)
    """The hub repository of each folder that is a snapshot in the cache."""
    hub: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """token, cache_dir and local_files_only, as in huggingface_hub."""

    @property
    def name(self) -> str:
        """The folder from which `load` loads the same model again."""
        return str((self.directory, *self.adapters)[-1])


def find(name: str, hub: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a name stands for; of a hub repository only the config is downloaded.

    For an adapter, the checkpoint of its base, with the adapter to add. hub: revision, token, cache_dir and
    local_files_only, as in huggingface_hub. Raises LookupError, FileNotFoundError, ConnectionError, PermissionError,
    and ValueError for a config that is not a Falcon's.
    """
    known = {each.name.lower(): each for each in catalogue()}
    short = name.strip().lower().removeprefix("tiiuae/")
    path = Path(name).expanduser()
    if short in known and not known[short].published:
        return _from_directory(embedded_directory(short), hub, known[short])
    if short and path.is_dir():
        return _from_directory(path, hub)
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder that holds it, with its config.json and tokenizer")
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no directory {name}: give one that holds a config.json, or a model's name")
    if not short:
        raise LookupError(f"the name is empty: give one of {', '.join(known)}, or a directory")
    if short not in known and "/" not in name:
        spec(name)  # raises LookupError with the nearest names
    return _from_hub(f"tiiuae/{known[short].name}" if short in known else name, hub)


def _from_directory(directory: Path, hub: Mapping[str, Any], shape: FalconSpec | None = None) -> Checkpoint:
    """The checkpoint in a directory. shape: its spec, where that is not the one of its config.json."""
    if base := adapter_base(directory):
        found = find(base, {**hub, "revision": None})  # the revision is the adapter's, not its base's
        shape = shape or adapter_spec(found.spec, directory)
        return replace(found, spec=shape, adapters=(*found.adapters, directory))
    shape = shape or spec(directory)
    return Checkpoint(directory, shape, _config(directory), shape, hub=hub)


def _from_hub(repository: str, hub: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a hub repository, after the download of its config.json or adapter_config.json."""
    shape = None
    try:
        file = fetch_config(repository, **hub)
    except (ConnectionError, FileNotFoundError):  # an adapter's repository has no config.json
        if (adapter_config := _fetch_adapter_config(repository, hub)) is None:
            raise
        file = adapter_config
    else:
        shape = FalconSpec.from_config(_read(file), repository)  # raises ValueError for another architecture
        shape = next((each for each in catalogue() if each.hub_id == repository), shape)
    found = _from_directory(file.parent, hub, shape)
    named = shape or replace(found.spec, name=repository)  # an adapter's snapshot is a folder named after a commit
    return replace(found, spec=named, repositories={**found.repositories, file.parent: repository})


def _fetch_adapter_config(repository: str, hub: Mapping[str, Any]) -> Path | None:
    """The config of an adapter on the hub; None where the repository holds no adapter or cannot be reached."""
    try:
        with hub_errors(repository):
            return Path(hf_hub_download(repository, "adapter_config.json", **hub))
    except (ConnectionError, FileNotFoundError):
        return None


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _config(directory: Path) -> FalconConfig:
    """The config in the form that this version of transformers reads, also where it was written in 2023."""
    stored = _read(directory / "config.json")
    return FalconConfig.from_dict(stored if stored["model_type"] == "falcon" else config_from_legacy(stored))


# Fetched and checked


def fetch(found: Checkpoint) -> list[Path]:
    """The weight files of a checkpoint; weights, tokenizer and adapters are downloaded where the cache lacks them.

    safetensors are preferred to pickled weights. Raises FileNotFoundError for missing weights or shards, and what
    `find` raises for the hub.
    """
    for directory, repository in found.repositories.items():
        if directory in found.adapters:
            _download(directory, repository, _ADAPTER_FILES, found.hub)
            continue
        _download(directory, repository, [*_TEXT_FILES, "*.safetensors"], found.hub)
        if not any(directory.glob("*.safetensors")):
            _download(directory, repository, ["*.bin"], found.hub)
    return _weight_files(found.directory)


def _download(snapshot: Path, repository: str, patterns: list[str], hub: Mapping[str, Any]) -> None:
    """Completes a snapshot in the cache, whose folder is named after its commit."""
    with hub_errors(repository):
        snapshot_download(repository, allow_patterns=patterns, **{**hub, "revision": snapshot.name})


def _weight_files(directory: Path) -> list[Path]:
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = directory / f"{stem}.{suffix}.index.json", directory / f"{stem}.{suffix}"
        if index.is_file():
            files = [directory / file for file in sorted(set(_read(index)["weight_map"].values()))]
        elif single.is_file():
            files = [single]
        else:
            continue
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{directory} lacks {len(missing)} of the {len(files)} shards that {index.name} names: "
                f"{', '.join(missing[:3])}; fetch them again"
            )
        return files
    raise FileNotFoundError(
        f"{directory} has a config.json but no weights: expected model.safetensors, pytorch_model.bin, or their index "
        "with its shards"
    )


def check_weights(found: Checkpoint, files: list[Path]) -> None:
    """Raises ValueError where a weight file, or an adapter's, was cut off, and FileNotFoundError for a missing one."""
    for file in (*map(weights_file, found.adapters), *files):
        _check_complete(file)


def _check_complete(file: Path) -> None:
    """Reads a file's header, not its tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return
        if zipfile.is_zipfile(file):
            return
        cause = "the end of the zip archive is missing"
    except SafetensorError as error:
        cause = str(error)
    raise ValueError(f"{file} is cut off or damaged ({file.stat().st_size:,} bytes; {cause}): fetch it again")
