"""Where a checkpoint lies and whether it is whole: embedded, in a directory, or fetched from the hub.

Everything that can be wrong is said before the weights are read: another architecture, a missing or cut-off shard, a
hub that cannot be reached.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import FalconConfig

from falcon_kit.catalogue import FalconSpec, catalogue, config_from_legacy, embedded_directory, spec
from falcon_kit.hub import fetch_config, hub_errors

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def locate(
    name: str, hub: dict[str, Any], decide: Callable[[FalconSpec, FalconConfig], None] = lambda *_: None
) -> tuple[Path, FalconSpec, FalconConfig]:
    """The directory that holds the checkpoint, downloaded where needed, its spec and its config.

    `decide` is told the spec and the config before weights are fetched, and may raise.
    """
    known = {each.name.lower(): each for each in catalogue()}
    short = name.strip().lower().removeprefix("tiiuae/")
    embedded = short in known and not known[short].published
    if embedded or (short and Path(name).expanduser().is_dir()):
        directory = embedded_directory(short) if embedded else Path(name).expanduser()
        shape, config = known[short] if embedded else spec(directory), _config(directory)
        decide(shape, config)
        return directory, shape, config
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"there is no directory {name}: give one that holds a config.json, or a model's name")
    if not short:
        raise LookupError(f"the name is empty: give one of {', '.join(known)}, or a directory")
    if short not in known and "/" not in name:
        spec(name)  # raises, and names the nearest
    repository = f"tiiuae/{known[short].name}" if short in known else name
    return _download(repository, hub, decide)


def _download(
    repository: str, hub: dict[str, Any], decide: Callable[[FalconSpec, FalconConfig], None]
) -> tuple[Path, FalconSpec, FalconConfig]:
    """Fetches a hub repository: config first, so that what is no Falcon, or too large, costs no more than that."""
    config_file = fetch_config(repository, **hub)
    shape = FalconSpec.from_config(_read(config_file), repository)  # raises for a model that is no Falcon
    config = _config(config_file.parent)
    shape = {f"tiiuae/{each.name}": each for each in catalogue()}.get(repository, shape)
    decide(shape, config)
    with hub_errors(repository):
        directory = Path(snapshot_download(repository, allow_patterns=[*_TEXT_FILES, "*.safetensors"], **hub))
        if not any(directory.glob("*.safetensors")):
            directory = Path(snapshot_download(repository, allow_patterns=[*_TEXT_FILES, "*.bin"], **hub))
    return directory, shape, config


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _config(directory: Path) -> FalconConfig:
    """The config as today's transformers wants it, whatever its age."""
    stored = _read(directory / "config.json")
    return FalconConfig.from_dict(stored if stored["model_type"] == "falcon" else config_from_legacy(stored))


def check_weights(directory: Path) -> list[Path]:
    """The weight files of a checkpoint, each complete."""
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
