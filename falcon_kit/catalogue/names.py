"""The Falcons that the kit knows by name, and the facts of Falcon-40B-Instruct's model card.

Nothing is downloaded, and neither torch nor transformers is imported.
Sources: the config.json files and the model card under https://huggingface.co/tiiuae.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.hub import fetch_config
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import unknown_name
from falcon_kit.display.tables import html_table

_EMBEDDED = {"falconet": "base", "falconet-instruct": "instruct"}


class Catalogue(tuple[FalconSpec, ...]):
    """All the Falcons that the kit knows by name; a tuple, and a table in Jupyter."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Catalogue({', '.join(each.name for each in self)})"

    def _repr_html_(self) -> str:
        facts = [(each.name, each.facts()) for each in self]
        shown = [key for key in facts[0][1] if key not in ("head_dim", "vocabulary", "context", "source")]
        rows = [(name, *(values[key] for key in shown)) for name, values in facts]
        return html_table("Falcons that the kit knows by name", ("name", *shown), rows)


def catalogue() -> Catalogue:
    """All the Falcons known by name: the embedded two first, then the published ones."""
    return Catalogue(_embedded_specs() + _PUBLISHED)


def spec(name: str | os.PathLike[str]) -> FalconSpec:
    """One Falcon: by catalogue name (any case, with or without "tiiuae/"), directory, path of a config.json, or hub id.

    An adapter's directory stands for its base with the adapter in it. Of another hub id, the config.json
    is fetched and nothing else. Raises LookupError for a string that
    is none of these, ConnectionError where the hub cannot be reached, FileNotFoundError for a directory without a
    config.json, and ValueError for a config that is broken or not a Falcon's.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"a {type(name).__name__} is no name, directory or hub id; a loaded Falcon has its spec: falcon.spec"
        )
    path = Path(name).expanduser()
    if isinstance(name, str):
        known = {each.name.lower(): each for each in catalogue()}
        if found := known.get(name.strip().lower().removeprefix("tiiuae/")):
            return found
        if not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            return _of_the_hub(name, list(known))
        if not path.exists():
            names = [each.name for each in known.values()]
            raise LookupError(f"{unknown_name('model', name, names)} Or give a directory or config.json that exists.")
    if base := adapter_base(path):
        return adapted(spec(base), path)
    file = path / "config.json" if path.is_dir() else path
    return FalconSpec.from_config(_read_json(file), file.absolute().parent.name, source=str(file))


def _of_the_hub(name: str, known: list[str]) -> FalconSpec:
    """The spec of a hub id. A name of tiiuae's that cannot be had may well be a slip: the nearest are named."""
    try:
        file = fetch_config(name)
    except (ConnectionError, LookupError) as error:
        if not name.startswith("tiiuae/"):
            raise
        raise LookupError(f"{unknown_name('model', name, known)} ({error})") from error
    return FalconSpec.from_config(_read_json(file), name, source=f"https://huggingface.co/{name}")


def adapter_base(directory: Path) -> str | None:
    """The model that the adapter in a directory was made for; None where there is a model, or neither."""
    file = directory / "adapter_config.json"
    if (directory / "config.json").is_file() or not file.is_file():
        return None
    base = _read_json(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not say what the adapter was made for: fk.merge(adapter, base) takes a base too")
    return str(base)


def adapted(base: FalconSpec, adapter: Path) -> FalconSpec:
    """The spec of `base` with the adapter in a directory: the same shape under a name of its own."""
    folder = adapter.absolute()
    own = {embedded_directory(name): name for name in _EMBEDDED}
    name = folder.parent.name if folder.name == "adapter" else folder.name  # `tune` writes output_dir/adapter
    name = own.get(folder, name)
    return replace(base, name=name, fine_tuned_from=base.name, published=False, source=str(folder))


def embedded_directory(name: str) -> Path:
    """The directory that ships inside the package: "falconet", a checkpoint, or "falconet-instruct", its adapter."""
    if name not in _EMBEDDED:
        raise LookupError(unknown_name("embedded model", name, list(_EMBEDDED)))
    return Path(__file__).parents[1] / "falconet" / _EMBEDDED[name]


def loadable_name(spec: FalconSpec, directory: str | os.PathLike[str]) -> str:
    """What `fk.load` finds a model by again: a hub id, the name of an embedded model, or its directory."""
    for name in _EMBEDDED:
        if str(directory) == str(embedded_directory(name)):
            return name
    return spec.hub_id or str(directory) or spec.name


def _read_json(file: Path) -> dict[str, Any]:
    """A config.json as a dictionary."""
    if not file.is_file():
        held = sorted(each.name for each in file.parent.glob("*"))[:6] if file.parent.is_dir() else []
        raise FileNotFoundError(f"{file} does not exist; its directory holds {', '.join(held) or 'nothing'}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); it may have been cut off: fetch it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, not the object that a config.json is.")
    return config


def _embedded_specs() -> tuple[FalconSpec, ...]:
    """The specs of what ships inside the package: the base as its own config says, and the adapter made for it."""
    config = embedded_directory("falconet") / "config.json"
    source = "falcon_kit/falconet/base/config.json"
    base = FalconSpec.from_config(_read_json(config), "falconet", licence="Apache 2.0", source=source)
    return base, replace(base, name="falconet-instruct", fine_tuned_from=base.name)


def _published(name: str, layers: int, d_model: int, query_heads: int, kv_heads: int, **other: Any) -> FalconSpec:
    """A published Falcon: what all of them share, and where its config stands."""
    shared = {"vocabulary": 65024, "intermediate_size": 4 * d_model, "licence": "Apache 2.0", "published": True}
    source = f"https://huggingface.co/tiiuae/{name}/blob/main/config.json"
    return FalconSpec(name, layers, d_model, query_heads, kv_heads, source=source, **{**shared, **other})


_7B: dict[str, Any] = {"norms_per_block": 1, "new_decoder_architecture": False}
_180B: dict[str, Any] = {"licence": "Falcon-180B TII License"}
_RW: dict[str, Any] = {"positions": "alibi", "parallel_block": False, "bias": True, "new_decoder_architecture": False}
_PUBLISHED = (
    _published("falcon-40b-instruct", 60, 8192, 128, 8, fine_tuned_from="falcon-40b"),
    _published("falcon-40b", 60, 8192, 128, 8),
    _published("falcon-7b-instruct", 32, 4544, 71, 1, fine_tuned_from="falcon-7b", **_7B),
    _published("falcon-7b", 32, 4544, 71, 1, **_7B),
    _published("falcon-180B-chat", 80, 14848, 232, 8, fine_tuned_from="falcon-180B", **_180B),
    _published("falcon-180B", 80, 14848, 232, 8, **_180B),
    _published("falcon-rw-1b", 24, 2048, 32, 32, vocabulary=50304, **_RW),
    _published("falcon-rw-7b", 36, 4096, 64, 64, **_RW),
)
