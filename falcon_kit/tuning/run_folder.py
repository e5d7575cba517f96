"""The output_dir of `fk.tune`, which belongs to one run.

run.lock         held while a run writes here
run.json         what determines the adapter: base model, data, settings
checkpoint-N/    see checkpoint_files.py
adapter/         the adapter, its model card, and its record tuning.json, written last: then the run is finished
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout

from falcon_kit.display.errors import differences, require
from falcon_kit.display.reading import read_json
from falcon_kit.display.saving import atomic_folder, check_folder, check_writable, remove, write_text
from falcon_kit.generation.own_format import storable
from falcon_kit.loading.adapter_checks import check_contents
from falcon_kit.loading.adapters import RECORD, Adapter, model_fingerprint
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.quantization import stored_quantisation
from falcon_kit.tuning import checkpoint_files, distributed
from falcon_kit.tuning.packing import Packed, column
from falcon_kit.tuning.runs import TuningRun, model_card
from falcon_kit.tuning.settings import Tuning
from falcon_kit.tuning.trainer import AdapterTrainer

_MAY_CHANGE_ON_RESUME = {"save_steps", "eval_steps"}
"""Settings that a resumed run may change, because the adapter does not depend on them. With patience it depends on
eval_steps, because patience counts evaluations."""


def digest(packed: Packed) -> str:
    """A hash of all tokens and labels. It reads the table's own memory, 150 million tokens in about a second."""
    digest = hashlib.sha256(json.dumps([packed.rows, packed.lengths]).encode())
    for name in ("ids", "trained"):
        for part in column(packed.examples, name):
            digest.update(part.flatten().to_numpy(zero_copy_only=name == "ids"))
    return digest.hexdigest()[:16]


def identity(
    falcon: Falcon, settings: Tuning, train: Packed, held_out: Packed | None, web_text: Packed | None
) -> dict[str, Any]:
    """Everything that determines the adapter and what is measured; computed before the model is sharded."""
    values = {
        "base": model_fingerprint(falcon.model.transformer),
        "first layer": _first_layer(falcon),
        "dtype": stored_quantisation(falcon.model.config) or str(falcon.model.dtype),
        "data": digest(train),
        "held-out data": held_out and digest(held_out),
        **({"web text": digest(web_text)} if web_text else {}),
        "processes": distributed.world_size(),
        **asdict(settings),
    }
    return dict(json.loads(json.dumps(values)))


def _first_layer(falcon: Falcon) -> str:
    """A hash of the attention of the first layer: an adapter that was merged elsewhere changes weights alone.

    Without the scales of nf4-double (weight.absmax, ...), which bitsandbytes rounds when a CPU first uses them.
    """
    sha, layer = hashlib.sha256(), cast(Any, falcon.model.transformer.h[0])
    for name, each in layer.self_attention.state_dict().items():
        if isinstance(each, torch.Tensor) and ".weight." not in name:
            sha.update(each.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def default_output_dir(name: str, identity: Mapping[str, Any]) -> Path:
    """runs/<name>-<hash of everything that determines the result>: another setting gets another folder."""
    determining = {key: value for key, value in identity.items() if key != "save_steps"}
    digest = hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{name}-{digest[:8]}"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a folder, which is made if need be. Raises BlockingIOError where another run of `fk.tune` holds it.

    The lock ends with its process, also if that is killed.
    """
    check_folder(directory, "output_dir")
    directory.mkdir(parents=True, exist_ok=True)
    check_writable(directory, f"output_dir={str(directory)!r}")
    try:
        lock = FileLock(directory / "run.lock", timeout=0).acquire()
    except Timeout as error:
        raise BlockingIOError(
            f"another run of fk.tune is writing in {directory}: wait until it has ended, or take another output_dir"
        ) from error
    with lock:
        yield


def prepare_output_dir(directory: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Writes run.json into a new folder, or checks that the run in the folder is the same one.

    resume=False deletes an earlier run first. Raises FileExistsError for folders with the names of a run's that
    `fk.tune` did not write, and ValueError for another run or a damaged run.json.
    """
    file = directory / "run.json"
    own = (directory / name for name in ("adapter", checkpoint_files.UNFINISHED))
    results = [*checkpoint_files.checkpoints(directory), *(each for each in own if each.exists())]
    if results and not file.is_file():
        raise FileExistsError(
            f"{results[0]} is not of a run of fk.tune, which has a {file.name} in the same folder, and would be "
            "overwritten: take another output_dir, or move it away"
        )
    if not resume:
        for each in results:
            remove(each)
    if resume and file.is_file():
        _check_same_run(file, identity, results)
    else:
        write_text(file, json.dumps(identity, indent=2) + "\n")


def _check_same_run(file: Path, identity: Mapping[str, Any], results: Sequence[Path]) -> None:
    remedy = (
        "another output_dir, or resume=False to start over there (without output_dir, each choice of settings gets a "
        "folder of its own)"
    )
    names = ", ".join(sorted(each.name for each in results))
    lost = f"the run there cannot be resumed without it, and resume=False deletes its {names}: " if names else ""
    started = read_json(file, f"{lost}take {remedy}")
    may_change = _MAY_CHANGE_ON_RESUME - ({"eval_steps"} if identity["patience"] else set())
    started |= {name: identity[name] for name in may_change}
    if found := differences(started, identity):
        raise ValueError(f"the run in {file.parent} has other settings ({found}): take the same, {remedy}")


def check_same_everywhere(identities: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless all processes, in the order of their ranks, have the same model, data and settings."""
    for rank, each in enumerate(identities):
        if found := differences(each, identities[0], (f"in process {rank}", "in process 0")):
            raise ValueError(
                f"the processes have different runs ({found}): give all machines the same command, and the same "
                "files of model and data"
            )


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a finished run; None for a run that is not finished. Raises ValueError for a damaged one.

    Raises FileNotFoundError or ValueError where its adapter cannot be read.
    """
    file = directory / "adapter" / RECORD
    if not file.is_file():
        return None
    remedy = "delete it, and the same call measures and writes it again"
    record = read_json(file, remedy)
    history, figures = record.get("history"), record.get("figures")
    whole = isinstance(history, list) and all(map(_are_numbers, [*history, figures]))
    require(whole, f"{file} has no history or figures: {remedy}")
    try:
        check_contents(Adapter(file.parent))
    except (OSError, ValueError) as error:
        again = f"delete the folder {file.parent}, and the same call makes it again"
        error.args = (f"the adapter of this finished run cannot be read ({error}): {again}",)
        raise
    return record


def _are_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(each, int | float) for each in values.values())


def save_adapter(trainer: AdapterTrainer, directory: Path) -> Path:
    """Saves the adapter, completely or not at all; returns its folder. Every process has to call it."""
    adapter = directory / "adapter"
    with ExitStack() as stack:
        with distributed.together():
            unfinished = atomic_folder(adapter, trainer.adapter_bytes)
            folder = stack.enter_context(unfinished) if distributed.is_rank0() else adapter
        with distributed.together():
            trainer.save_model(str(folder))
            stack.close()
    return adapter


def write_record(run: TuningRun, base_fingerprint: str) -> None:
    """Writes the model card, then the record, which marks the run as finished."""
    record = {
        "base": run.falcon.name,
        "base_fingerprint": base_fingerprint,
        "chat_format": storable(run.packed.chat_format),
        "settings": asdict(run.settings),
        "figures": dict(run.figures),
        "history": run.history,
    }
    write_text(run.adapter / "README.md", model_card(run))
    write_text(run.adapter / RECORD, json.dumps(record, indent=2) + "\n")
