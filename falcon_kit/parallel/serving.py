"""A worker's life: it joins the other ranks, loads its part, and answers what the notebook asks."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import StoppingCriteria

from falcon_kit.generation.ranks import any_rank
from falcon_kit.generation.stream import Stream
from falcon_kit.generation.text import Generation
from falcon_kit.parallel.ranks import Rank, own, own_bytes
from falcon_kit.parallel.workers import Link


def serve(load: Callable[..., Any]) -> None:
    """A worker's life: joins the others, loads its part with `load`, and answers requests until it is ended."""
    link = Link()
    try:
        rank = _join(link.folder)
        request = link.receive()
        falcon = load(request["directory"], **request["settings"])
        link.send(done=_describe(falcon, rank, 0))
        while True:
            request = link.receive()
            try:
                link.send(done=_answer(falcon, request, link))
            except EOFError:
                raise
            except Exception as error:  # noqa: BLE001  # raised again where it was asked for
                link.send(error=[type(error).__name__, str(error)])
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001  # told in words to whoever waits for it, who then ends us all
        link.send(error=[type(error).__name__, str(error)])
        link.receive()


def _join(folder: Path) -> int:
    """Makes this process a rank. They find each other by a file, for this user's eyes only, instead of an open port."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    gpu = torch.device("cuda", rank) if torch.cuda.is_available() else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    backend, meeting = "gloo" if gpu is None else "nccl", f"file://{folder}/store"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks, device_id=gpu)
    return rank


def _describe(falcon: Any, rank: int, cache_bytes: int) -> dict[str, Any]:
    return asdict(Rank(rank, str(own(falcon.model.lm_head.weight).device), own_bytes(falcon.model), cache_bytes))


class _Withdrawn(StoppingCriteria):
    """Stops all ranks at the same token once the request is not wanted any more."""

    def __init__(self, link: Link, number: int, ranks: DeviceMesh) -> None:
        self.link, self.number, self.ranks = link, number, ranks

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = any_rank(self.link.cancelled == self.number, self.ranks, input_ids.device)
        return torch.full((len(input_ids),), over, device=input_ids.device)


def _answer(falcon: Any, request: Mapping[str, Any], link: Link) -> dict[str, Any]:
    """What a request asks for, from this rank."""
    prompt, settings, ranks = request["prompt"], request["settings"], falcon.model.transformer.tp_mesh
    if request["call"] == "stream":
        generations = [_stream(falcon.stream(prompt, **settings), link, ranks.get_local_rank() == 0)]
    else:
        ends = [_Withdrawn(link, request["number"], ranks)]
        written = getattr(falcon, request["call"])(prompt, stopping_criteria=ends, **settings)
        generations = written if isinstance(written, list) else [written]
    answer = _describe(falcon, ranks.get_local_rank(), generations[0].stats.cache_bytes or 0)
    if ranks.get_local_rank() == 0:  # the others have written the same
        answer |= {"generations": [asdict(each) for each in generations]}
    return answer


def _stream(stream: Stream, link: Link, first: bool) -> Generation:
    """Runs a stream; the first rank hands its pieces over, one at a time, and stops all when told to."""
    for piece in stream:
        if first:
            link.send(piece=asdict(piece))
            if not link.receive()["go"]:
                stream.close()
    return stream.generation
