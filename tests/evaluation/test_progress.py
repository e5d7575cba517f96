"""A run that was broken off goes on where it was, and a folder belongs to one run."""

import json

import pytest

from falcon_kit.evaluation.progress import Progress

RECORD = {"model": "falconet", "settings": {"chat": False}, "versions": {"torch": "1"}}


def doubled(seen):
    def function(part):
        seen.extend(part)
        return [2 * each for each in part]

    return function


def test_finished_parts_are_not_computed_again(tmp_path):
    first, again = [], []

    def breaks(part):
        if 5 in part:
            raise KeyboardInterrupt
        return doubled(first)(part)

    with pytest.raises(KeyboardInterrupt):
        Progress(tmp_path / "run", RECORD).map("task a/b", list(range(8)), breaks, size=2)
    assert Progress(tmp_path / "run", RECORD).map("task a/b", list(range(8)), doubled(again), size=2) == [
        *range(0, 16, 2)
    ]
    assert (first, again) == ([0, 1, 2, 3], [4, 5, 6, 7])


def test_another_input_is_computed(tmp_path):
    seen = []
    for inputs in ([1, 2], [1, 3]):
        Progress(tmp_path, RECORD).map("task", inputs, doubled(seen))
    assert seen == [1, 2, 1, 3]


def test_a_folder_belongs_to_one_run(tmp_path):
    Progress(tmp_path, RECORD)
    with pytest.raises(ValueError, match=r"settings\.chat: False there, True here\): take the same, or another"):
        Progress(tmp_path, RECORD | {"settings": {"chat": True}})


def test_another_version_of_a_library_goes_on(tmp_path):
    Progress(tmp_path, RECORD)
    Progress(tmp_path, RECORD | {"versions": {"torch": "2"}})


def test_log_probabilities_that_are_rounded_in_another_way_are_the_same(tmp_path):
    Progress(tmp_path, RECORD | {"probe": [-2.538, -7.94]})
    Progress(tmp_path, RECORD | {"probe": [-2.54, -7.938]})
    with pytest.raises(ValueError, match=r"of something else \(probe: "):
        Progress(tmp_path, RECORD | {"probe": [-2.538, -7.8]})


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds files, but no run\.json of fk\.evaluate"):
        Progress(tmp_path, RECORD)
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        Progress(tmp_path / "thesis.txt", RECORD)


def test_a_damaged_part_is_named(tmp_path):
    Progress(tmp_path, RECORD).map("task", [1], lambda part: part)
    (part,) = (tmp_path / "parts").iterdir()
    for content, problem in {
        "[1": "is damaged",
        "{}": "is damaged",
        "[" * 10**5: "too deep",
        "[]": "0 results of 1",
    }.items():
        part.write_text(content)
        with pytest.raises(ValueError, match=f"{part.name} .*{problem}.*: delete it"):
            Progress(tmp_path, RECORD).map("task", [1], lambda part: part)
    assert json.loads((tmp_path / "run.json").read_text()) == RECORD
