"""A checkpoint found by name, fetched from the hub and checked: embedded, in a directory, or in a hub repository.

Every error comes before the weights are read: another architecture, a missing or cut-off shard, an unreachable hub.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import DryRunFileInfo, snapshot_download
from huggingface_hub.errors import DryRunError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import FalconConfig

from falcon_kit.catalogue import names
from falcon_kit.catalogue.gguf import GGUFFile, find_gguf, gguf_file
from falcon_kit.catalogue.hub import cache_alone_if_cut_off, fetch_configs, hub_errors
from falcon_kit.catalogue.spec import FalconSpec, config_from_legacy
from falcon_kit.display.errors import printable
from falcon_kit.display.reading import INCOMPLETE, named_errors, read_json
from falcon_kit.loading.adapters import PICKLED_WEIGHTS, RECORD, WEIGHTS, damaged, load_pickled, weights_file
from falcon_kit.loading.gguf import check_kinds
from falcon_kit.planning.downloads import disk_shortage
from falcon_kit.planning.environment import free_disk

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
_READ_BY_TRANSFORMERS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_ADAPTER_FILES = [*_TEXT_FILES, WEIGHTS, PICKLED_WEIGHTS, RECORD]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, with the adapters to add to it. Its weights may still have to be fetched."""

    directory: Path
    """The folder of weights, config and tokenizer; for a hub repository its snapshot in the cache; or a GGUF file."""
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
    gguf: GGUFFile | None = None
    """What the GGUF file holds, if it is one."""
    hub: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """revision, token, cache_dir and local_files_only, as in huggingface_hub."""

    @property
    def name(self) -> str:
        """The folder from which `load` loads the same model again."""
        return str((self.directory, *self.adapters)[-1])

    @property
    def is_adapter(self) -> bool:
        """Whether the model asked for is an adapter in a folder without its base."""
        return bool(self.adapters) and self.adapters[-1] != self.directory


def find(name: str | os.PathLike[str], hub: Mapping[str, Any], seen: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint that a name stands for; of a hub repository only the config is downloaded.

    For an adapter, the checkpoint of its base, with the adapter to add. hub: revision, token, cache_dir and
    local_files_only, as in huggingface_hub. seen: the adapters whose base is looked for. Raises LookupError,
    FileNotFoundError, ConnectionError, PermissionError, and ValueError for a config that is not a Falcon's and an
    adapter that is its own base.
    """
    known, path = names.known_name(name), names.local_path(name)
    if not str(name).strip():
        raise LookupError(
            f"the name is empty: give one of {', '.join(each.name for each in names.catalogue())}, or a directory"
        )
    if not seen and hub.get("revision") is not None and names.is_here(name):
        raise ValueError(
            f"revision={hub['revision']!r} is of a hub repository, and {name} is on this machine: leave it out"
        )
    if known and not known.published:
        return _from_directory(names.embedded_directory(known.name), hub, known, seen)
    if known and known.hub_id:
        return _from_hub(known.hub_id, hub, seen)
    if file := find_gguf(path):
        return _from_gguf(file, hub)
    if path.is_dir():
        return _from_directory(path, hub, None, seen)
    if path.is_file():
        raise ValueError(
            f"{name} is a file: give the folder that holds it, with its config.json and tokenizer, or a .gguf file"
        )
    if not isinstance(name, str):
        raise FileNotFoundError(f"there is no directory {name}: give one that holds a config.json, or a model's name")
    names.check_directory(name)
    if "/" not in name:
        names.spec(name)  # raises LookupError with the nearest names
    return _from_hub(name, hub, seen)


def _from_directory(
    directory: Path, hub: Mapping[str, Any], shape: FalconSpec | None, seen: tuple[str, ...], repository: str = ""
) -> Checkpoint:
    """The checkpoint in a directory. shape: its spec, where that is not the one of its config.json."""
    if (base := names.adapter_base(directory)) is None:
        return _with_config(directory, hub, shape)
    if names.holds_base(directory, base, repository):
        found = _with_config(directory, hub, None)
    else:
        chain = names.check_chain(repository or str(directory.resolve()), seen)
        with names.base_errors(directory, base):
            found = find(base, {**hub, "revision": names.base_revision(directory)}, chain)
    shape = shape or names.adapter_spec(found.spec, directory)
    if directory.resolve() in (each.resolve() for each in found.adapters):  # a snapshot whose repository holds the base
        return replace(found, spec=shape)
    return replace(found, spec=shape, adapters=(*found.adapters, directory))


def _from_gguf(path: Path, hub: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint in a GGUF file, which holds all that a folder does."""
    file = gguf_file(path)
    with named_errors(path, "get it from another source, or export it again with fk.export_gguf"):
        config = FalconConfig.from_dict(dict(file.config))
    return Checkpoint(path, file.spec, config, file.spec, gguf=file, hub=hub)


def _with_config(directory: Path, hub: Mapping[str, Any], shape: FalconSpec | None) -> Checkpoint:
    shape = shape or names.spec(directory / "config.json")
    return Checkpoint(directory, shape, _config(directory), shape, hub=hub)


def _from_hub(repository: str, hub: Mapping[str, Any], seen: tuple[str, ...]) -> Checkpoint:
    """The checkpoint in a hub repository, after the download of its config.json, adapter_config.json or both."""
    hub = cache_alone_if_cut_off(hub)  # for the weights too
    with names.hub_id_errors(repository):
        folder = fetch_configs(repository, **hub)
    shape = next((each for each in names.catalogue() if each.hub_id == repository), None)
    found = _from_directory(folder, hub, shape, seen, repository)
    if shape:
        named = shape
    elif hub.get("revision") is None:
        named = names.on_hub(found.spec, repository)
    else:  # the id alone would load another commit
        named = replace(found.spec, name=repository)
    base = named if not found.adapters or folder == found.directory else found.base
    return replace(found, spec=named, base=base, repositories={**found.repositories, folder: repository})


def _config(directory: Path) -> FalconConfig:
    """The config in the form that this version of transformers reads, also where it was written in 2023."""
    file = directory / "config.json"
    stored = read_json(file)
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(stored.get(key)):
            raise ValueError(
                f"{file} has {key}={stored[key]!r}, code that transformers would fetch from "
                "the hub and run: remove the key; model.set_attn_implementation chooses sdpa, eager or flash-attention"
            )
    current = stored if stored["model_type"] == "falcon" else config_from_legacy(stored)
    with named_errors(file, "correct it, or download it again"):
        config = FalconConfig.from_dict(current)
    config.name_or_path = str(directory)  # errors about the config name it
    return config


# Fetched and checked


def fetch(found: Checkpoint) -> list[Path]:
    """The weight files of a checkpoint; weights, tokenizer and adapters are downloaded where the cache lacks them.

    safetensors are preferred to pickled weights. Raises OSError where the disk has no room for them, FileNotFoundError
    for missing weights or shards, and what `find` raises for the hub.
    """
    for directory, repository in found.repositories.items():
        if directory in found.adapters:
            _download(directory, repository, _ADAPTER_FILES, found.hub)
        if directory != found.directory:
            continue
        _download(directory, repository, [*_TEXT_FILES, "*.safetensors"], found.hub)
        if not any(directory.glob("*.safetensors")):
            _download(directory, repository, ["*.bin"], found.hub)
    return _weight_files(found.directory)


def _download(snapshot: Path, repository: str, patterns: list[str], hub: Mapping[str, Any]) -> None:
    """Completes a snapshot in the cache, whose folder is named after its commit."""
    options = {"allow_patterns": patterns, **hub, "revision": snapshot.name}
    _check_room(snapshot, repository, options)
    with hub_errors(repository):
        snapshot_download(repository, **options)


def _check_room(snapshot: Path, repository: str, options: Mapping[str, Any]) -> None:
    """Raises OSError where the files that a download would fetch are larger than the disk has room for."""
    if options.get("local_files_only"):
        return
    try:
        listed: list[DryRunFileInfo] = snapshot_download(repository, **options, dry_run=True)
    except (DryRunError, HfHubHTTPError):  # without the hub; the download itself uses the cache, or says what is wrong
        return
    needed, free = sum(each.file_size or 0 for each in listed if each.will_download), free_disk(snapshot)
    if needed > free:
        raise OSError(disk_shortage(needed, free, options.get("cache_dir")))


def _weight_files(directory: Path) -> list[Path]:
    """The weight files: a GGUF file itself, or those that transformers reads.

    A single file counts before an index, and safetensors before pickles.
    """
    if directory.is_file():
        return [directory]
    for name in ("model.safetensors", "pytorch_model.bin"):
        single, index = directory / name, directory / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    raise FileNotFoundError(
        f"{directory} has a config.json but no weights: expected model.safetensors, pytorch_model.bin, or their index "
        "with its shards"
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names. Raises FileNotFoundError for missing ones, ValueError for a path."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(name, str) for name in weight_map.values())):
        raise ValueError(f"{index} has no weight_map of weights to files; {INCOMPLETE}.")
    shards = sorted(set(weight_map.values()))
    if outside := [name for name in shards if Path(name).name != name or name == ".." or "\\" in name]:
        raise ValueError(
            f"{index} names the shard {outside[0]!r}, but shards lie beside their index: "
            "move it there and correct the index, or fetch the checkpoint again"
        )
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} shards that {index.name} names: "
            f"{', '.join(map(printable, missing[:3]))}; fetch them again"
        )
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f'{index} has no object "metadata", which transformers reads: write "metadata": {{}} there.')
    return [index.parent / name for name in shards]


def check_weights(found: Checkpoint, files: list[Path]) -> None:
    """Raises ValueError where a file is damaged or cut off, and FileNotFoundError where an adapter's is missing."""
    if found.gguf:
        check_kinds(found.gguf)
        files = []
    for file in (found.directory / name for name in _READ_BY_TRANSFORMERS):
        if file.is_file():
            read_json(file)
    for file in (*map(weights_file, found.adapters), *files):
        _check_complete(file)


def _check_complete(file: Path) -> None:
    """Reads a file's header, not its tensors."""
    if file.suffix != ".safetensors":
        load_pickled(file)
        return
    try:
        with safe_open(file, framework="pt"):
            return
    except SafetensorError as error:
        raise ValueError(damaged(file, error)) from error
