"""GGUF files by their headers: the shape of a Falcon, the kinds of its tensors, and files that are refused."""

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import falcon_kit as fk
from falcon_kit.catalogue.gguf import MERGED_ADAPTERS, stored_names, stored_shapes
from falcon_kit.catalogue.gguf_header import read_header
from falcon_kit.catalogue.spec import FalconSpec
from falcon_kit.serving.gguf import write_gguf
from tests.conftest import LAYOUTS, small_config, small_model


def spec_of(config, name="small"):
    return FalconSpec.from_config(config.to_dict(), name)


def written(folder, layout="40b", dtype="float32", tokenizer=None, **changes):
    model = small_model(layout, **changes)
    return write_gguf(model, spec_of(model.config), folder / "small.gguf", dtype, tokenizer)


SHAPES = {name: (name, {}) for name in sorted(LAYOUTS.keys() - {"rw"})} | {
    "40b with a head of its own": ("40b", {"tie_word_embeddings": False}),
    "11b, one LayerNorm": ("40b", {"num_ln_in_parallel_attn": 1}),
    "40b with one KV head": ("40b", {"num_kv_heads": 1}),
    "a narrow MLP and a long context": ("7b", {"ffn_hidden_size": 320, "max_position_embeddings": 512}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_gives_the_shape_of_the_model_that_it_was_written_from(name, tmp_path):
    layout, changes = SHAPES[name]
    expected = spec_of(small_config(layout, **changes))
    found = fk.spec(written(tmp_path, layout, **changes))
    assert found.to_config() == expected.to_config()
    assert (found.parameters, found.name) == (expected.parameters, "small")


def test_spec_plan_and_requirements_take_a_file_and_its_folder(tmp_path):
    path = written(tmp_path)
    for given in (path, str(path), tmp_path):
        assert fk.spec(given) == fk.gguf_file(path).spec
    assert fk.plan(path, "int4").weight_bytes == fk.plan(spec_of(small_config("40b")), "int4").weight_bytes
    assert fk.requirements(path, 1).download_bytes == 0


def test_reading_a_file_loads_no_torch(tmp_path):
    code = f"import sys, falcon_kit as fk; fk.spec({str(written(tmp_path))!r}); print({{'torch', 'transformers'}} & "
    code += "{*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_header_is_what_ggufs_own_reader_reads(tokenizer, tmp_path):
    path = written(tmp_path, dtype="q4_k_m", tokenizer=tokenizer)
    metadata, tensors = read_header(path)
    reader = gguf.GGUFReader(path)
    fields = {key: each.contents() for key, each in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: list(each) if hasattr(each, "typecode") else each for key, each in metadata.items()} == fields
    theirs = {each.name: (each.tensor_type.name, each.data_offset, each.n_bytes) for each in reader.tensors}
    assert {name: (each.kind, each.offset, each.bytes) for name, each in tensors.items()} == theirs
    assert {each.name: tuple(map(int, each.shape[::-1])) for each in reader.tensors} == {
        name: each.shape for name, each in tensors.items()
    }


def test_names_and_shapes_are_those_of_the_model():
    model = small_model("40b")
    spec, weights = spec_of(model.config), model.state_dict()
    shapes, names = stored_shapes(spec), stored_names(spec)
    assert {name: tuple(weights[name].shape) for name in names} == {name: shapes[names[name]] for name in names}
    assert weights.keys() - names.keys() == {"lm_head.weight"}


def test_a_file_lists_its_kinds(tmp_path):
    file = fk.gguf_file(written(tmp_path, dtype="q4_k_m"))
    assert file.kinds.keys() == {"Q8_0", "Q4_K", "Q5_K", "Q6_K", "F32"}
    assert sum(file.kinds.values()) == sum(each.bytes for each in file.tensors.values())
    assert repr(file).startswith("GGUFFile(small, 1.")
    stored = gguf.GGUFReader(file.path).tensors
    bits = 8 * sum(int(each.n_bytes) for each in stored) / sum(int(each.n_elements) for each in stored)
    assert file.bits_per_weight == bits
    assert f"{bits:.2f} bits per weight" in file._repr_html_()


# Refused


def changed(path, **fields):
    """The file with other metadata: gguf's writer copies the rest. A value of None removes a key."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), fields.pop("architecture", "falcon"))
    values = {key.removeprefix("falcon."): each for key, each in reader.fields.items() if not key.startswith("GGUF.")}
    del values["general.architecture"]
    for key, field in values.items():
        prefix = "" if key.startswith(("general.", "tokenizer.")) else "falcon."
        value = fields.get(key, field.contents())
        if value is not None:
            kind = field.types[0] if key not in fields else gguf.GGUFValueType.get_type(value)
            writer.add_key_value(prefix + key, value, kind, field.types[-1])
    for key in fields.keys() - values.keys():
        writer.add_key_value(key, fields[key], gguf.GGUFValueType.get_type(fields[key]))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


REFUSED = {
    "another architecture": (
        {"architecture": "llama"},
        "of the architecture 'llama', not of a Falcon: give",
    ),
    "a missing key": ({"block_count": None}, "its metadata lack falcon.block_count"),
    "more layers": ({"block_count": 3}, "it lacks the tensor blk.2.attn_norm.weight"),
    "2**31 - 1 layers": ({"block_count": 2**31 - 1}, "its metadata state 2147483647 layers, and it has 19 tensors"),
    "fewer layers": ({"block_count": 1}, "it has 8 tensors that no Falcon of llama.cpp has, such as .*blk.1"),
    "another width": (
        {"embedding_length": 512},
        r"has the shape \(2048, 256\), where .* \(2048, 512\)",
    ),
    "no heads": ({"attention.head_count": 0}, "num_attention_heads is 0, but it must be a whole number"),
    "a text": ({"attention.head_count_kv": "x"}, "num_kv_heads is 'x', but it must be a whole number"),
    "epsilon": ({"attention.layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan, but it must be a positive"),
    "scaled positions": ({"falcon.rope.scaling.type": "yarn"}, r"its rotary positions are scaled \('yarn'\)"),
    "a token of another vocabulary": (
        {"tokenizer.ggml.eos_token_id": 9999},
        "its eos_token_id is 9999, of 2048 tokens",
    ),
    "merged adapters": ({MERGED_ADAPTERS: [7]}, r"its falcon_kit.merged_adapters is .*7.*, not a list of digests"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_falcons_is_refused_by_name(name, tmp_path):
    fields, match = REFUSED[name]
    path = changed(written(tmp_path), **fields)
    for call in (fk.spec, fk.plan, fk.load, fk.gguf_file):
        with pytest.raises(ValueError, match=rf"changed.gguf.*{match}"):
            call(path)


def damaged(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def cut(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


DAMAGE = {
    "empty": (lambda path: cut(path, 0), "it ends inside its header"),
    "no magic": (lambda path: damaged(path, 0, b"PK\3\4"), "it is not a GGUF file"),
    "an old version": (lambda path: damaged(path, 4, b"\1"), "its version of GGUF is 1, and 2 and 3 are read"),
    "big-endian": (lambda path: damaged(path, 4, b"\0\0\0\3"), "its version of GGUF is 50331648"),
    "cut in its header": (lambda path: cut(path, 200), "it ends inside its header"),
    "cut in its tensors": (lambda path: cut(path, path.stat().st_size - 100), "it ends before its tensor .* does"),
    "countless values": (lambda path: damaged(path, 16, struct.pack("<Q", 2**62)), "values"),
    "countless tensors": (lambda path: damaged(path, 8, struct.pack("<Q", 2**62)), "dimensions"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_by_name(name, tmp_path):
    damage, match = DAMAGE[name]
    damage(path := written(tmp_path))
    for call in (fk.spec, fk.load):
        with pytest.raises(ValueError, match=rf"small.gguf cannot be used.*{match}.*download it again"):
            call(path)


def test_an_array_of_any_stated_length_ends(tmp_path):
    path = tmp_path / "long.gguf"
    key = b"general.x"
    header = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, len(key)) + key
    for kind in (0, 8, 9):
        path.write_bytes(header + struct.pack("<IIQ", 9, kind, 2**60))
        with pytest.raises(ValueError, match=r"long\.gguf cannot be used"):
            fk.gguf_file(path)


@pytest.mark.parametrize("name", ["a-00001-of-00003.gguf", "A-00002-OF-00003.GGUF"])
def test_a_part_of_a_split_file_is_refused_with_the_way_to_join_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF")
    for given in (tmp_path / name, tmp_path):
        for call in (fk.spec, fk.load):
            with pytest.raises(ValueError, match=r"is one part of a file that was split: .*llama-gguf-split --merge"):
                call(given)


def test_several_files_in_a_folder_are_listed(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    for call in (fk.spec, fk.load):
        with pytest.raises(ValueError, match=r"has several GGUF files: give the path of one, such as .*a.gguf"):
            call(tmp_path)


def test_a_config_in_the_folder_counts_before_a_gguf_file(checkpoint):
    (checkpoint / "other.gguf").write_bytes(b"no GGUF")
    assert fk.spec(checkpoint).name == checkpoint.name


@pytest.mark.parametrize("name", ["a.gguf", "./no/where/a.GGUF"])
def test_a_missing_file_is_named(name):
    for call in (fk.spec, fk.load, fk.gguf_file):
        with pytest.raises(FileNotFoundError, match=f"there is no file .*{Path(name).name}"):
            call(name)
