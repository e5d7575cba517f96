"""Tensor parallelism of a decoder layer, in transformers' terms."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers.distributed.tensor_parallel import AllReduceParallel, RowwiseParallel


class _Share(RowwiseParallel):
    """A linear layer, divided by columns, whose results the ranks do not add up yet."""

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local(grad_placements=[Replicate()]) if isinstance(output, DTensor) else output


class _Sum(AllReduceParallel):
    """Adds up what the ranks have."""

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        if torch.is_grad_enabled() and output.requires_grad:
            return super().transform_output_post_forward(module, output, mesh)
        dist.all_reduce(output, group=mesh.get_group())
        return output


STYLES = {"falcon_share": _Share(), "falcon_sum": _Sum()}


PARALLEL_BLOCK_TP_PLAN = {
    "h.*.self_attention.dense": "falcon_share",
    "h.*.mlp.dense_4h_to_h": "falcon_share",
    "h.*.block_output": "falcon_sum",
}
"""Where attention and feed-forward stand side by side, their results are added anyway: under tensor parallelism the
ranks do so once for both, which is what the parallel block is for. transformers' own rows add up twice. By module."""
