"""Tensor parallelism of the parallel block, as a plan for transformers: one all-reduce per layer instead of two."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers.distributed.tensor_parallel import AllReduceParallel, RowwiseParallel


class _PartialSum(RowwiseParallel):
    """A row-wise parallel linear layer whose output stays a partial sum on each rank, without an all-reduce."""

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        return output.to_local(grad_placements=[Replicate()]) if isinstance(output, DTensor) else output


class _AllReduce(AllReduceParallel):
    """The sum of the module's outputs over all ranks. Without gradients the all-reduce is in place."""

    def transform_output_post_forward(self, module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
        if torch.is_grad_enabled() and output.requires_grad:
            return super().transform_output_post_forward(module, output, mesh)
        dist.all_reduce(output, group=mesh.get_group())
        return output


PARALLEL_STYLES = {"falcon_partial_sum": _PartialSum(), "falcon_all_reduce": _AllReduce()}
"""The parallel styles that PARALLEL_BLOCK_TP_PLAN adds to those of transformers, by name."""
PARALLEL_BLOCK_TP_PLAN = {
    "h.*.self_attention.dense": "falcon_partial_sum",
    "h.*.mlp.dense_4h_to_h": "falcon_partial_sum",
    "h.*.block_output": "falcon_all_reduce",
}
"""Attention and MLP outputs stay partial sums; one all-reduce adds both. The plan maps module names to styles.

transformers' own "rowwise" style needs two all-reduces per layer."""
