"""Checkpoint folders of a run, `checkpoint-N` after step N, which are complete or absent.

A checkpoint is written in the folder `unfinished`. Its last file lists all others with their sizes, which also detects
a checkpoint that was copied in part. Then the folder is renamed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from falcon_kit.display.saving import move_folder, remove_quietly
from falcon_kit.display.warning import warn

KEPT = 2
"""Checkpoints that are kept, besides the best one: the last two."""
UNFINISHED = "unfinished"
_FILES = "files.json"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(run: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, the newest first."""
    folders = [each for each in run.glob("checkpoint-*") if re.fullmatch(r"\w+-\d+", each.name)]
    return sorted(folders, key=step_of, reverse=True)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint exists and has the size it was written with."""
    try:
        sizes = dict(json.loads((checkpoint / _FILES).read_text(encoding="utf-8")))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError):  # also where the list is JSON of another kind
        return False


def last_complete(run: Path) -> Path | None:
    """The newest complete checkpoint; None if there is none."""
    return next(filter(is_complete, checkpoints(run)), None)


def warn_of_incomplete(run: Path) -> None:
    """Warns if the newest checkpoint is incomplete, so that training resumes from an older one."""
    newest, last = next(iter(checkpoints(run)), None), last_complete(run)
    if newest != last:
        warn(
            f"{newest} is incomplete: files are missing or were copied in part. Training resumes from "
            f"{last or 'the start'}; to resume from there, interrupt and copy it here again"
        )


def publish(checkpoint: Path, run: Path, best: str | None) -> None:
    """Moves a checkpoint from `unfinished` into the run's folder, then deletes all but the last two and `best`."""
    files = [each for each in checkpoint.rglob("*") if each.is_file()]
    sizes = {str(each.relative_to(checkpoint)): each.stat().st_size for each in files}
    (checkpoint / _FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    move_folder(checkpoint, run / checkpoint.name)
    checkpoint.parent.rmdir()
    for old in list(filter(is_complete, checkpoints(run)))[KEPT:]:
        if str(old) != best:
            remove_quietly(old)
