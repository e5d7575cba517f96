"""The catalogue of Falcons, and the FalconSpec of a name, a directory or a hub id.

Neither torch nor transformers is imported; only a hub id may download a file, its config.json.
Sources: the config.json files under https://huggingface.co/tiiuae.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.gguf import find_gguf, gguf_file
from falcon_kit.catalogue.hub import cache_alone_if_cut_off, fetch_configs
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import is_encodable, printable, shown, unknown_name
from falcon_kit.display.reading import read_json
from falcon_kit.display.tables import html_table

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_EMBEDDED = {"falconet": "base", "falconet-instruct": "instruct"}


class Catalogue(tuple[FalconSpec, ...]):
    """The specs of all Falcons with a name in the kit: a tuple, and a table in Jupyter."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Catalogue({', '.join(each.name for each in self)})"

    def _repr_html_(self) -> str:
        facts = [(each.name, each.facts()) for each in self]
        shown = [key for key in facts[0][1] if key not in ("head_dim", "vocabulary", "context", "source")]
        rows = [(name, *(values[key] for key in shown)) for name, values in facts]
        return html_table("Falcon models in the catalogue", ("name", *shown), rows)


def catalogue() -> Catalogue:
    """All Falcon models in the catalogue: the two embedded ones, then the published ones."""
    return Catalogue(_embedded_specs() + _PUBLISHED)


def spec(name: str | os.PathLike[str]) -> FalconSpec:
    """The spec of a catalogue name (any case, with or without "tiiuae/"), a directory, a config.json, a .gguf file or a
    hub id.

    The spec of an adapter is that of its base model under the adapter's name. For a hub id outside the catalogue, only
    the config.json or adapter_config.json is downloaded. Raises LookupError for any other string, ConnectionError if
    the hub cannot be reached, FileNotFoundError for a path without a config.json, and ValueError for a config that
    is not valid JSON or not a Falcon's.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(
            f"spec takes a name, directory or hub id, not a {type(name).__name__}; for a loaded Falcon, use falcon.spec"
        )
    return _spec(name, ())


def _spec(name: str | os.PathLike[str], seen: tuple[str, ...], revision: str | None = None) -> FalconSpec:
    """The spec of a name. seen: the adapters whose base it is, from `check_chain`; revision: of a hub repository."""
    if known := known_name(name):
        return known
    path = local_path(name)
    if isinstance(name, str) and not (name.strip() and path.exists()):
        check_directory(name)
        if _HUB_ID.fullmatch(name):
            with hub_id_errors(name):
                folder = fetch_configs(name, **cache_alone_if_cut_off({"revision": revision}))
            return on_hub(_directory_spec(folder, seen, name), name)
        names = [each.name for each in catalogue()]
        raise LookupError(
            f"{unknown_name('model', name, names)} Or give an existing directory, a config.json, or "
            "an id of the hub, such as 'tiiuae/falcon-11B'."
        )
    return _directory_spec(path, seen)


def known_name(name: str | os.PathLike[str]) -> FalconSpec | None:
    """The Falcon of the catalogue that a text names; None for a path.

    An embedded model comes before a folder of its name, a published one after it.
    """
    known = {each.name.lower(): each for each in catalogue()}
    found = known.get(name.strip().lower().removeprefix("tiiuae/")) if isinstance(name, str) else None
    return None if found and found.published and local_path(name).is_dir() else found


def local_path(name: str | os.PathLike[str]) -> Path:
    """A name as a path, with ~ expanded where there is such a user. Raises LookupError for one that is too long."""
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        path = Path(name)
    try:
        path.stat()  # from Python 3.14 on, exists() would say no
    except (OSError, ValueError) as error:  # other errors come again where the path is read
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            raise LookupError(
                f"{shown(str(name))} is longer than any path, and no model has such a name: give a name, a directory "
                "or an id of the hub"
            ) from None
    return path


def is_here(name: str | os.PathLike[str]) -> bool:
    """Whether a name is of something on this machine: an embedded model, a folder or a file."""
    known = known_name(name)
    return local_path(name).exists() if known is None else not known.published


def _directory_spec(path: Path, seen: tuple[str, ...], repository: str | None = None) -> FalconSpec:
    """The spec of a directory, with an adapter or a config.json in it, or of a config.json."""
    if base := adapter_base(path):
        if holds_base(path, base, repository):
            return adapter_spec(_config_spec(path), path)
        chain = check_chain(repository or str(path.resolve()), seen)
        with base_errors(path, base):
            return adapter_spec(_spec(base, chain, base_revision(path)), path)
    return _config_spec(path)


def _config_spec(path: Path) -> FalconSpec:
    if file := find_gguf(path):
        return gguf_file(file).spec
    file = path / "config.json" if path.is_dir() else path
    return FalconSpec.from_config(_read_json(file), file.absolute().parent.name, source=str(file))


def on_hub(spec: FalconSpec, repository: str) -> FalconSpec:
    """The spec under the id of its repository."""
    return replace(spec, name=repository, source=f"https://huggingface.co/{repository}")


def check_directory(name: str) -> None:
    """Raises FileNotFoundError for a name that is a path, not a hub id, where it does not exist."""
    if name.lower().endswith(".gguf"):
        raise FileNotFoundError(f"there is no file {name}: give the path of a .gguf file, or a model's name")
    if name.endswith(".json"):
        raise FileNotFoundError(f"there is no file {name}: give a config.json, its directory, or a model's name")
    if name.startswith(("/", ".", "~", "runs/")) or "\\" in name or ("/" in name and not _HUB_ID.fullmatch(name)):
        raise FileNotFoundError(f"there is no directory {name}: give one that holds a config.json, or a model's name")


@contextmanager
def hub_id_errors(name: str) -> Iterator[None]:
    """Adds to the hub's errors what else a name could mean: a directory, or a Falcon of the catalogue."""
    try:
        yield
    except (ConnectionError, LookupError) as error:
        if local_path(name).parent.is_dir():
            raise FileNotFoundError(
                f"there is no directory {name}; as the name of a hub repository: {error}"
            ) from error
        names = [each.name for each in catalogue()]
        if not name.startswith("tiiuae/") or name.removeprefix("tiiuae/") in names:
            raise
        unknown = unknown_name("model", name, names)
        if isinstance(error, LookupError):
            raise LookupError(f"{unknown} ({error})") from error
        raise ConnectionError(f"{error}. If it is no hub id: {unknown}") from error


# Adapters


def adapter_base(directory: Path) -> str | None:
    """The base model of the adapter in a directory; None for a directory without one.

    As in transformers, an adapter_config.json counts before a config.json beside it.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        return None
    base = _read_json(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{file} does not name the adapter's base model: pass it, fk.merge(adapter, base)")
    if not is_encodable(str(base)):
        raise ValueError(f"{file} names the base model {base!r}, which is no valid text: write its name there")
    return str(base)


def base_revision(directory: Path) -> str | None:
    """The revision of its base model's repository that the adapter in a directory was made for; None for the newest."""
    revision = _read_json(directory / "adapter_config.json").get("revision")
    return None if revision is None else str(revision)


def holds_base(directory: Path, base: str, repository: str | None) -> bool:
    """Whether an adapter's folder holds its base too: the adapter names that folder, and a config.json is in it."""
    with base_errors(directory, base):
        itself = base == repository or local_path(base).resolve() == directory.resolve()
    return itself and (directory / "config.json").is_file()


def check_chain(adapter: str, seen: tuple[str, ...]) -> tuple[str, ...]:
    """The adapters seen so far with one more. Raises ValueError where an adapter is its own base."""
    if adapter in seen:
        raise ValueError(
            f"the adapter in {adapter} names itself as its base model, directly or through other adapters: "
            "fk.merge(adapter, base) takes the base that it was trained on"
        )
    return (*seen, adapter)


@contextmanager
def base_errors(adapter: Path, base: str) -> Iterator[None]:
    """Adds to the errors about a base model that is not found which adapter asks for it, and the way out."""
    try:
        yield
    except (ConnectionError, FileNotFoundError, LookupError) as error:
        kind = next(each for each in (ConnectionError, FileNotFoundError, LookupError) if isinstance(error, each))
        raise kind(
            f"the base model of the adapter in {adapter}, {printable(base)}, is not found here ({error}): "
            "fk.merge(adapter, base) takes the base from another place"
        ) from error


def adapter_spec(base: FalconSpec, adapter: Path) -> FalconSpec:
    """The spec of `base` with the adapter of a directory: the same shape under the adapter's name."""
    folder = adapter.absolute()
    name = folder.parent.name if folder.name == "adapter" else folder.name  # `tune` writes output_dir/adapter
    name = embedded_name(folder) or name
    return replace(base, name=name, fine_tuned_from=base.name, published=False, source=str(folder))


def embedded_directory(name: str) -> Path:
    """A directory inside the package: the checkpoint "falconet", or its adapter "falconet-instruct"."""
    if name not in _EMBEDDED:
        raise LookupError(unknown_name("embedded model", name, list(_EMBEDDED)))
    return Path(__file__).parents[1] / "falconet" / _EMBEDDED[name]


def embedded_name(directory: str | os.PathLike[str]) -> str | None:
    """The name of the embedded model in a directory; None for another directory."""
    return next((name for name in _EMBEDDED if Path(directory) == embedded_directory(name)), None)


def loadable_name(spec: FalconSpec, directory: str | os.PathLike[str]) -> str:
    """A name that `fk.load` accepts for a loaded model: that of an embedded model, a hub id, or the directory."""
    return embedded_name(directory) or spec.hub_id or str(directory) or spec.name


def _read_json(file: Path) -> dict[str, Any]:
    """A config.json as a dictionary. Raises FileNotFoundError, and ValueError for anything but a JSON object."""
    if not file.is_file():
        names = sorted(printable(each.name) for each in file.parent.glob("*"))[:6] if file.parent.is_dir() else []
        below = [each.parent for kind in ("", "adapter_") for each in sorted(file.parent.glob(f"*/{kind}config.json"))]
        instead = f" Give {below[0]}, which holds one." if below else ""
        raise FileNotFoundError(
            f"{file} does not exist; its directory contains {', '.join(names) or 'nothing'}.{instead}"
        )
    return read_json(file)


@cache
def _embedded_specs() -> tuple[FalconSpec, ...]:
    """The specs of the models inside the package: the base, from its config.json, and the base with its adapter."""
    config = embedded_directory("falconet") / "config.json"
    source = "falcon_kit/falconet/base/config.json"
    base = FalconSpec.from_config(_read_json(config), "falconet", licence="Apache 2.0", source=source)
    return base, replace(base, name="falconet-instruct", fine_tuned_from=base.name)


def _published(name: str, layers: int, d_model: int, query_heads: int, kv_heads: int, **differing: Any) -> FalconSpec:
    """The spec of a published Falcon, with the values that most of them have in common as defaults."""
    defaults = {"vocabulary": 65024, "intermediate_size": 4 * d_model, "licence": "Apache 2.0", "published": True}
    source = f"https://huggingface.co/tiiuae/{name}/blob/main/config.json"
    return FalconSpec(name, layers, d_model, query_heads, kv_heads, source=source, **{**defaults, **differing})


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
