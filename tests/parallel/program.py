"""The program that `torchrun` runs on every rank for `test_launching.py`: loads its part, computes, saves results."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import falcon_kit as fk
from tests.conftest import logits

IDS = torch.tensor([[23, 900, 77, 1500, 42], [11, 11, 77, 1500, 42]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 11, "return_dict_in_generate": True}


def mask_per_head(heads: int) -> torch.Tensor:
    """(1, H, T, T): each head attends to one token less of the past than the head before it, and always to itself."""
    back = torch.arange(5)[:, None] - torch.arange(5)
    return torch.stack([(back >= 0) & ((back == 0) | (back <= 4 - head % 4)) for head in range(heads)])[None]


def sums_of_a_forward(model: torch.nn.Module) -> int:
    """The number of all-reduces in one forward pass."""
    counted, real = [], dist.all_reduce
    dist.all_reduce = lambda *arguments, **more: (counted.append(1), real(*arguments, **more))[1]
    try:
        logits(model)
    finally:
        dist.all_reduce = real
    return len(counted)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the loss of a few tokens, whole on every rank."""
    model(IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}


def report(directory: Path) -> None:
    """Saves all results for one checkpoint in its folder."""
    falcon = fk.load(directory, dtype="float32", tensor_parallel=2)
    model, rank = falcon.model, dist.get_rank()
    tensors = {"logits": logits(model)}
    with torch.inference_mode():
        tensors["per head"] = model(IDS[:1], attention_mask=mask_per_head(falcon.spec.query_heads)).logits
    caches = {}
    for name, options in {"dynamic": {}, "static": {"cache_implementation": "static"}}.items():
        output = model.generate(IDS, attention_mask=MASK, **GREEDY, **options)
        tensors[f"greedy {name}"] = output.sequences
        caches[name] = sum(each.keys.nbytes + each.values.nbytes for each in output.past_key_values.layers)
    drawn = falcon.generate("Hello", do_sample=True, temperature=2.0, max_new_tokens=20)
    torch.manual_seed(rank)  # from here on the ranks' random states differ
    apart = falcon.generate("Hello", do_sample=True, temperature=2.0, max_new_tokens=20)
    cut = falcon.stream("Hello", max_new_tokens=50)
    taken = [piece.token_id for piece, _ in zip(cut, range(3), strict=False)] if rank == 0 else [*cut]
    cut.close()
    facts = {
        "weights": falcon.weight_bytes,
        "caches": caches,
        "drawn": [drawn.tokens, apart.tokens],
        "cut": [len(taken), len(cut.generation.tokens), cut.generation.finish_reason],
        "sums": sums_of_a_forward(model),
    }
    tensors |= {f"gradient {name}": each for name, each in gradients(model.train()).items()}
    model.save_pretrained(directory / "saved")
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / f"rank-{rank}.safetensors")
    (directory / f"rank-{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    for each in sys.argv[1:]:
        report(Path(each))
    dist.destroy_process_group()
