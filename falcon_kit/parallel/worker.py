"""A worker process: it joins the process group, loads its part of the model, and answers requests."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from falcon_kit.display.errors import is_out_of_memory
from falcon_kit.generation.own_format import stored_format
from falcon_kit.generation.ranks import any_rank
from falcon_kit.generation.stream import Stream
from falcon_kit.generation.text import Generation
from falcon_kit.parallel.ranks import Rank, local_tensor
from falcon_kit.parallel.workers import Link

_READER_TIMEOUT = timedelta(days=7)


def serve(load: Callable[..., Any]) -> None:
    """Loads this rank's part of the model with `load`, and answers requests until the process is ended."""
    link = Link()
    try:
        rank = _init_process_group(link.folder)
        request = link.receive()
        settings = {**request["settings"], "chat": stored_format(request["settings"]["chat"])}
        falcon = load(request["directory"], **settings)
        link.send(done=_rank(falcon, rank, 0) | {"generation_settings": falcon.generation_settings})
        answer: dict[str, Any] = {}
        while True:
            request = link.receive()
            if "call" in request and request["number"] != answer.get("number"):
                try:
                    answer = {"number": request["number"], "done": _answer(falcon, request, link)}
                except Exception as error:  # noqa: BLE001  # raised again in the notebook's process
                    answer = {"number": request["number"], "error": _named(error)}
            link.send(**answer)  # again where the request was cancelled: Ctrl-C may have come before it was kept
    except Exception as error:  # noqa: BLE001  # raised again in the notebook's process, which then ends the workers
        link.send(error=_named(error))
        link.receive()


def _named(error: Exception) -> list[str]:
    """An error's type and text. torch's types of errors are named after Python's own."""
    return ["MemoryError" if is_out_of_memory(error) else type(error).__name__, str(error)]


def _init_process_group(folder: Path) -> int:
    """Joins the process group and returns this process's rank.

    The ranks meet through a file that only this user can read, instead of an open port. The timeout is longer than any
    reader pauses in a stream, for which one rank waits and the others wait for that one.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.device("cuda", rank) if torch.cuda.is_available() else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    backend, store = "gloo" if gpu is None else "nccl", f"file://{folder}/store"
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=ranks, device_id=gpu, timeout=_READER_TIMEOUT
    )
    return rank


def _rank(falcon: Any, rank: int, cache_bytes: int) -> dict[str, Any]:
    """The fields of this process's `Rank`."""
    device = str(local_tensor(falcon.model.lm_head.weight).device)
    return asdict(Rank(rank, device, falcon.weight_bytes, cache_bytes))


def _answer(falcon: Any, request: Mapping[str, Any], link: Link) -> dict[str, Any]:
    """This rank's answer to a request: the fields of its `Rank`, and from rank 0 the generated texts."""
    prompt, settings, mesh = request["prompt"], request["settings"], falcon.model.transformer.tp_mesh
    rank = mesh.get_local_rank()

    def is_cancelled(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """As a `StoppingCriteria`, which stops all ranks at the same token."""
        cancelled = any_rank(link.cancelled == request["number"], mesh, input_ids.device)
        return torch.full((len(input_ids),), cancelled, device=input_ids.device)

    if request["call"] == "stream":
        generations = [_stream(falcon.stream(prompt, **settings), link, request["number"], rank == 0)]
    else:
        result = getattr(falcon, request["call"])(prompt, stopping_criteria=[is_cancelled], **settings)
        generations = result if isinstance(result, list) else [result]
    answer = _rank(falcon, rank, generations[0].stats.cache_bytes or 0)
    if rank == 0:  # all ranks generate the same texts
        answer |= {"generations": [asdict(each) for each in generations]}
    return answer


def _stream(stream: Stream, link: Link, number: int, first: bool) -> Generation:
    """Runs a stream to its end. The first rank sends each piece, and continues or stops all ranks as the reply says.

    Any other message says that the request was cancelled: Ctrl-C in the notebook's process may come before it replies.
    """
    for piece in stream:
        if first:
            link.send(number=number, piece=asdict(piece))
            if not link.receive().get("go"):
                stream.close()
    return stream.generation
