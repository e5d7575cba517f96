"""The model that `serve` is given, as the files that a server reads.

A Falcon counts with the weights that it has in memory, so they are saved. A name counts as its files: those of a
checkpoint in safetensors and a GGUF file are read where they are; an adapter is merged first, since no server here
adds one to Falcon.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from falcon_kit.catalogue.gguf import GGUFFile
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.display.errors import to_save
from falcon_kit.display.reading import read_json
from falcon_kit.display.saving import check_disk_space, write_text
from falcon_kit.display.tables import format_bytes
from falcon_kit.generation.chat import ChatFormat
from falcon_kit.loading.checkpoints import Checkpoint, check_weights, fetch, find
from falcon_kit.loading.checks import check_adapters
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.gguf import gguf_tokenizer
from falcon_kit.loading.load import choose_dtype, load
from falcon_kit.loading.merging import merge
from falcon_kit.loading.tokenizer import TOKEN_IDS, generation_config, load_tokenizer, trained_format
from falcon_kit.loading.writing import write_model
from falcon_kit.model.checks import live_spec
from falcon_kit.planning.devices import resolve_devices
from falcon_kit.planning.environment import empty_gpu_cache
from falcon_kit.planning.plan import Plan, plan
from falcon_kit.serving.gguf import check_writable, export_gguf
from falcon_kit.serving.gguf_kinds import stored_dtype

_HUB: dict[str, Any] = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False}


@dataclass(frozen=True)
class Source:
    """A model to serve: a Falcon in memory, or a checkpoint that was found by its name."""

    name: str
    """The name that `fk.load` loads it by."""
    spec: FalconSpec
    dtype: str
    """The dtype in which `fk.load` has, or would have, its weights; of a GGUF file llama.cpp's name for its own."""
    model: Falcon | Checkpoint

    @property
    def file(self) -> GGUFFile | None:
        """The GGUF file that llama.cpp reads as it is, if the model is one."""
        return self.model.gguf if isinstance(self.model, Checkpoint) and not self.model.adapters else None

    def loads(self, gguf: bool) -> bool:
        """Whether this process loads the weights to write the server's files. gguf: whether that reads GGUF files."""
        return isinstance(self.model, Checkpoint) and not self.file and (gguf or bool(self.model.adapters))

    @property
    def short_name(self) -> str:
        """A name for a file, and for the model at its endpoint."""
        return self.spec.name.rpartition("/")[2]


@dataclass(frozen=True)
class Files:
    """What a server reads."""

    path: Path
    """The checkpoint's folder, or the GGUF file."""
    note: str
    """Its size, if it is one file or was written for the server, and where it is; else empty."""
    again: str
    """The call that makes it on another machine; empty if that machine needs no more than the model's name."""
    chat_format: ChatFormat
    """The format of conversations."""
    has_template: bool = True
    """Whether the files have a chat template, in that format."""


def source_of(model: Any) -> Source:
    """The model that is meant: a Falcon, a run of `fk.tune`, or a name as for `fk.load`.

    Raises TypeError for anything else, ValueError for a Falcon whose weights no server can read, and what `fk.load`
    raises for a name.
    """
    model = getattr(model, "adapter", model)
    if isinstance(model, Falcon):
        original = f"give the name of the original, fk.serve({model.name!r})"
        merged = f"serve the merged model, fk.serve(fk.merge(adapter, {model.name!r}))"
        check_writable(model.model, quantised=original, adapted=merged, offloaded=original)
        return Source(model.name, live_spec(model.spec, model.model), model.dtype, model)
    if not isinstance(model, str | Path):
        raise TypeError(
            f"fk.serve takes a Falcon of this process, the run of fk.tune, or a name as fk.load does, not a "
            f"{type(model).__name__}{to_save(model)}"
        )
    found = find(model, _HUB)
    check_adapters(found)  # which `fk.load` would refuse once the files are being written
    own = stored_dtype(found.gguf) if found.gguf and not found.adapters else None
    return Source(str(model), found.spec, own or _loaded_dtype(found), found)


def loading_plan(found: Checkpoint) -> Plan:
    """The memory plan of `fk.load` for a checkpoint, without its adapters."""
    return plan(found.spec, _loaded_dtype(found), found.spec.context, devices=resolve_devices(None))


def _loaded_dtype(found: Checkpoint) -> str:
    """The dtype in which `fk.load` would have a checkpoint here."""
    return choose_dtype(None, found, on_cpu=resolve_devices(None)[0].key == "cpu")[0]


def files_for(source: Source, folder: Path, dtype: str, gguf: bool) -> Files:
    """The files of a model, written to `folder` unless the checkpoint itself can be read.

    dtype: of the weights in a GGUF file. Raises OSError where the disk has no room, and what loading and merging raise.
    """
    checkpoint = source.model if isinstance(source.model, Checkpoint) and not source.model.adapters else None
    if checkpoint and (files := _without_a_copy(checkpoint, source, folder, gguf)):
        return files
    try:
        return _write(source, folder, dtype, gguf)
    finally:  # what was loaded for that is gone by now
        empty_gpu_cache()


def _without_a_copy(found: Checkpoint, source: Source, folder: Path, gguf: bool) -> Files | None:
    """The files of a checkpoint themselves; None where the server cannot read them."""
    if found.gguf:
        note = f"{format_bytes(found.gguf.path.stat().st_size)}, read as it is"
        return _where_it_is(found, found.gguf.path.absolute(), gguf_tokenizer(found.gguf), note)
    if gguf:
        return None
    weights = fetch(found)
    check_weights(found, weights)
    is_current = read_json(found.directory / "config.json").get("model_type") == "falcon"  # others are of 2023
    if not is_current or weights[0].suffix != ".safetensors":
        return None
    tokenizer = load_tokenizer(found.directory)
    if corrected := _corrected_generation(found.directory, tokenizer):
        path = _write_links(found.directory, folder / source.short_name, corrected)
        note = "links to the checkpoint's, with the right end token, in a temporary folder"
        return _where_it_is(found, path, tokenizer, note, saving(source))
    return _where_it_is(found, found.directory, tokenizer)


def _where_it_is(
    found: Checkpoint, path: Path, tokenizer: PreTrainedTokenizerBase, note: str = "", again: str = ""
) -> Files:
    """A checkpoint's folder or a GGUF file that a server reads without a copy."""
    return Files(path, note, again, trained_format(found, tokenizer), tokenizer.chat_template is not None)


def _corrected_generation(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of generation_config.json with the end token of `fk.load`; empty where the file needs no change.

    Servers take the end token from this file, and never end a text with that of 2023.
    """
    if (config := generation_config(directory, tokenizer)) is None:
        return {}
    content = read_json(directory / "generation_config.json")
    right = {name: getattr(config, name) for name in TOKEN_IDS}
    return {} if right["eos_token_id"] == content.get("eos_token_id") else content | right


def _write_links(directory: Path, path: Path, generation: dict[str, Any]) -> Path:
    """A folder of links to the files of a checkpoint, with a generation config of its own."""
    path.mkdir()
    for each in directory.iterdir():
        (path / each.name).symlink_to(each.absolute())
    write_text(path / "generation_config.json", json.dumps(generation, indent=2))  # replaces the link
    return path


def _write(source: Source, folder: Path, dtype: str, gguf: bool) -> Files:
    falcon = _in_memory(source)
    return _write_gguf(falcon, source, folder, dtype) if gguf else _write_checkpoint(falcon, source, folder)


def _in_memory(source: Source) -> Falcon:
    """The model, loaded if it is not in memory yet."""
    if isinstance(source.model, Falcon):
        return source.model
    if source.model.is_adapter:
        fetch(source.model)
        return merge(source.model.adapters[-1])
    return load(source.name)


def _write_checkpoint(falcon: Falcon, source: Source, folder: Path) -> Files:
    path, size = folder / source.short_name, falcon.weight_bytes
    check_disk_space(path, size)
    write_model(falcon.model, falcon.tokenizer, path)
    note = f"{format_bytes(size)}, saved for this server in a temporary folder"
    return Files(path, note, saving(source), falcon.chat_format)


def saving(source: Source, path: str | None = None) -> str:
    """The calls that write the checkpoint on another machine. path: its folder in them; None, the model's name."""
    path = path or repr(source.short_name)
    if isinstance(source.model, Checkpoint) and source.model.is_adapter:
        return f"fk.merge({source.name!r}, output_dir={path})"
    return "; ".join([*_loading(source), f"falcon.save({path})"])


def _loading(source: Source) -> list[str]:
    """The call that makes the variable `falcon`; none where serve was given a Falcon."""
    return [] if isinstance(source.model, Falcon) else [f"falcon = fk.load({source.name!r})"]


def _write_gguf(falcon: Falcon, source: Source, folder: Path, dtype: str) -> Files:
    path = export_gguf(falcon, folder / f"{source.short_name}.gguf", dtype)
    export = f"fk.export_gguf(falcon, {path.name!r}{'' if dtype == falcon.dtype else f', {dtype!r}'})"
    again = "; ".join([*_loading(source), export])
    note = f"{format_bytes(path.stat().st_size)}, exported for this server to a temporary folder"
    return Files(path, note, again, falcon.chat_format)
