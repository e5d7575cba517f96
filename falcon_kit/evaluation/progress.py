"""A run in parts: each finished part is a file, so that a run that was broken off goes on where it was."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from falcon_kit.display.errors import differences, require
from falcon_kit.display.reading import parse_json, read_json
from falcon_kit.display.saving import check_folder, write_text

_RECORD = "run.json"
_MAY_CHANGE = {"versions", "batch_size"}
"""What does not change a result beyond rounding."""
_ROUNDING = 0.05
"""How far two lists of log-probabilities may differ: other kernels round 16 bits in another way."""
_AGAIN = "delete it, and the same call computes it again"


class Progress:
    """The finished parts of a run, in a folder or only in memory."""

    def __init__(self, output_dir: str | Path | None, record: Mapping[str, Any]) -> None:
        """record: what determines the results. Raises ValueError if the folder has another run or other files."""
        self.folder = None if output_dir is None else Path(output_dir).expanduser()
        if self.folder is not None:
            _prepare(self.folder, dict(json.loads(json.dumps(record))))

    def map(
        self, name: str, inputs: Sequence[Any], function: Callable[[Sequence[Any]], list[Any]], size: int = 256
    ) -> list[Any]:
        """`function` of all inputs, called with `size` of them at a time. Inputs and results are JSON values."""
        results: list[Any] = []
        with tqdm(total=len(inputs), desc=name, leave=False, delay=10) as bar:
            for start in range(0, len(inputs), size):
                part = inputs[start : start + size]
                results += self._part(f"{_slug(name)}-{start:06}", part, function)
                bar.update(len(part))
        return results

    def _part(self, name: str, part: Sequence[Any], function: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        if self.folder is None:
            return function(part)
        digest = hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12]
        file = self.folder / "parts" / f"{name}-{digest}.json"
        if file.is_file():
            results = _read(file)
            require(len(results) == len(part), f"{file} has {len(results)} results of {len(part)}: {_AGAIN}")
            return results
        results = function(part)
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(results) + "\n")
        return results


def _slug(name: str) -> str:
    """A name for files: letters, digits and dashes, and a hash where something else was in it."""
    plain = re.sub(r"[^A-Za-z0-9-]+", "-", name)[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _prepare(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json into a new folder, or checks that the run in the folder is the same one."""
    file = folder / _RECORD
    check_folder(folder, "output_dir")
    if file.is_file():
        started = read_json(file, "take another output_dir")
        found = differences(dict(_flat(started)), dict(_flat(record)), is_same=_is_same)
        require(not found, f"the run in {folder} is of something else ({found}): take the same, or another output_dir")
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files, but no {_RECORD} of fk.evaluate: take another output_dir")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(record, indent=2) + "\n")


def _is_same(there: Any, here: Any) -> bool:
    """Whether two values are equal; two lists of numbers, but for rounding."""
    if isinstance(there, list) and isinstance(here, list) and all(isinstance(each, float) for each in (*there, *here)):
        return len(there) == len(here) and all(map(partial(math.isclose, abs_tol=_ROUNDING), there, here))
    return bool(there == here)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that may not change, with the names that lead to it: "settings.chat"."""
    for name, value in values.items():
        if name in _MAY_CHANGE:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _read(file: Path) -> list[Any]:
    """The results in a part. Raises ValueError for a damaged one."""
    try:
        results = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): {_AGAIN}") from None
    require(isinstance(results, list), f"{file} is damaged (it has no list): {_AGAIN}")
    return list(results)
