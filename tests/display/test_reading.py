"""JSON of other programs is read, or refused with the name of the file, the reason and what to do."""

import pytest

from falcon_kit.display.reading import named_errors, parse_json, read_json


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b" ", r"is not valid JSON \(it is empty\); it may be incomplete: download it again"),
        (b"[" * 100_000, r"is not valid JSON \(it is nested too deeply\)"),
        (b"{'a': 1}", r"is not valid JSON \(Expecting property name.*line 1 column 2"),
        (b'"caf\xe9"', r"is not valid JSON \('utf-8' codec can't decode byte 0xe9"),
        (b"[1]", r"contains a list, but a some\.json is a JSON object"),
        (
            b'{"a": 1, "b": {"c": 1, "c": 2}}',
            r"cannot be used: it names 'c' twice, with different values: keep the one",
        ),
        (b"null", r"contains a NoneType, but a some\.json is a JSON object"),
    ],
)
def test_anything_but_a_json_object_is_refused(tmp_path, content, reason):
    (file := tmp_path / "some.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"some\.json {reason}") as error:
        read_json(file)
    assert type(error.value) is ValueError


def test_a_json_object_is_read(tmp_path):
    (file := tmp_path / "some.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json(file) == parse_json(file.read_bytes()) == {"a": "é"}


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), Exception("x")])
def test_the_errors_of_a_library_name_the_file(tmp_path, error):
    with (
        pytest.raises(ValueError, match=rf"a\.json cannot be used \({type(error).__name__}: .*x.*\); save it again\."),
        named_errors(tmp_path / "a.json", "save it again"),
    ):
        raise error


def test_control_characters_in_the_errors_of_a_library_are_written_out(tmp_path):
    with pytest.raises(ValueError, match=r"\(ValueError: one\n\\x1b\[2J\)"), named_errors(tmp_path / "a.json"):
        raise ValueError("one\n\x1b[2J")


@pytest.mark.parametrize("error", [OSError("x"), MemoryError(), ImportError("x"), KeyboardInterrupt()])
def test_errors_that_are_not_about_the_content_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, named_errors(tmp_path / "a.json"):
        raise error
    assert caught.value is error
