"""FSDP2: every rank holds a shard of each weight, gradient and optimizer state; blocks are gathered while they run.

Mistakes that would be silent, and are avoided here: sharding `model.model` and then the model (tied heads come apart);
calling a part of the model outside of its root's forward (full tensors and shards mix); leaving the mean over ranks to
a backend (some sum where a mean is asked for; here gradients are summed, which `check_gradient_sum` verifies before
training).
"""

from collections.abc import Callable
from types import MethodType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from masters.config import Train
from masters.models.distributed.base import check_gradient_sum, transformer_blocks

T = TypeVar("T")
FULL_FORWARD = "forward_with_full_weights"  # method of a root module in which its weights are full tensors


class Fsdp2:
    """Shards of weights over an initialized process group (see `base.Sharding`).

    With products in bfloat16, weights are gathered in bfloat16: autocast, which `Replicate` uses, would keep a copy of
    all of them until the backward pass. Shards of weights and sums of gradients stay in float32.
    """

    lockstep = True

    def __init__(self, device: str) -> None:
        device_type = torch.device(device).type
        if device_type == "cuda":
            torch.cuda.set_device(device)
        self._mesh = init_device_mesh(device_type, (dist.get_world_size(),))
        check_gradient_sum(self, "fsdp2", device)

    def shard_model(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        policy = MixedPrecisionPolicy()
        if train and train.compute_dtype != "float32":
            policy = MixedPrecisionPolicy(getattr(torch, train.compute_dtype), reduce_dtype=torch.float32)
        for block in transformer_blocks(model):
            self._shard_module(block, policy)
        return self._shard_module(model, policy)  # embeddings, head and norms outside of blocks, as one group

    def local_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        # a root keeps its own weights gathered after a forward pass without gradients, and would reuse these
        cast(FSDPModule, model).reshard()
        return dict(model.named_parameters())

    def run_with_full_weights(self, model: torch.nn.Module, function: Callable[[torch.nn.Module], T]) -> T:
        return getattr(model, FULL_FORWARD)(function)

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """Do nothing: every backward pass has already summed its gradients over the ranks."""

    def full_tensor(self, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard(self, full: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        sharded = cast(DTensor, parameter)
        # every rank has the full tensor, so nothing is sent
        return distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)

    def _shard_module(self, module: torch.nn.Module, policy: MixedPrecisionPolicy) -> torch.nn.Module:
        fully_shard(module, mesh=self._mesh, mp_policy=policy)
        sharded = cast(FSDPModule, module)
        # losses are already divided by the number of questions of all ranks, so gradients are summed: by a plain sum,
        # since backends differ in what they make of "mean"
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_gradient_divide_factor(1.0)
        setattr(module, FULL_FORWARD, MethodType(lambda root, function: function(root), module))
        register_fsdp_forward_method(module, FULL_FORWARD)
        return module
