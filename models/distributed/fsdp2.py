"""FSDP2: every rank holds a share of each weight, gradient and optimizer state, blocks are gathered while they run.

What would go wrong silently, and is not done here: sharding `model.model` and then the model (tied heads come apart);
calling a part of the model outside of its root's forward (tensors and shares mix); leaving the mean over ranks to a
backend (some sum where a mean is wanted: gradients are summed here, which `check_gradient_sum` shows before anything
is trained).
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
FORWARD = "within_forward"  # the method of a root in which its weights are whole


class Fsdp2:
    """Shares of weights on a process group that is there already (see `base.Sharding`).

    With products in bfloat16, weights are gathered in it: autocast, which replicas take, would keep a copy of all of
    them until the backward pass. Shares of weights and sums of gradients stay in float32.
    """

    lockstep = True

    def __init__(self, device: str) -> None:
        kind = torch.device(device).type
        if kind == "cuda":
            torch.cuda.set_device(device)
        self._mesh = init_device_mesh(kind, (dist.get_world_size(),))
        check_gradient_sum(self, "fsdp2", device)

    def shard_model(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        policy = MixedPrecisionPolicy()
        if train and train.compute_dtype != "float32":
            policy = MixedPrecisionPolicy(getattr(torch, train.compute_dtype), reduce_dtype=torch.float32)
        for block in transformer_blocks(model):
            self._shard(block, policy)
        return self._shard(model, policy)  # and what is in no block: embeddings, the head, norms, as one

    def local_parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        # a root keeps its own weights gathered after a forward pass without gradients, and would go on with them
        cast(FSDPModule, model).reshard()
        return dict(model.named_parameters())

    def within(self, model: torch.nn.Module, work: Callable[[torch.nn.Module], T]) -> T:
        return getattr(model, FORWARD)(work)

    def sum_gradients(self, model: torch.nn.Module) -> None:
        """They are: every backward pass sums what it adds."""

    def full_tensor(self, part: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        return part.full_tensor() if isinstance(part, DTensor) else part

    def shard(self, whole: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        shared = cast(DTensor, like)
        # every rank has the whole, so that nothing is sent
        return distribute_tensor(whole, shared.device_mesh, shared.placements, src_data_rank=None)

    def _shard(self, module: torch.nn.Module, policy: MixedPrecisionPolicy) -> torch.nn.Module:
        fully_shard(module, mesh=self._mesh, mp_policy=policy)
        shared = cast(FSDPModule, module)
        # losses are divided by the questions of all ranks already, so gradients are to be summed: by a plain sum, as
        # what a backend makes of "mean" differs
        shared.set_force_sum_reduction_for_comms(True)
        shared.set_gradient_divide_factor(1.0)
        setattr(module, FORWARD, MethodType(lambda itself, work: work(itself), module))
        register_fsdp_forward_method(module, FORWARD)
        return module
