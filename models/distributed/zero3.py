"""DeepSpeed ZeRO-3: as in FSDP2 a rank holds a share of each weight, gradient and optimiser state; the hooks that
gather weights and scatter gradients are DeepSpeed's.

Its optimiser never steps: AdamW steps on the shares, as everywhere, so that checkpoints, guards and masks are those of
every way. A share is the part of a flattened weight that DeepSpeed keeps on this rank, in its own memory.

What would go wrong silently, and is not done here: taking the mean over ranks, which DeepSpeed makes, for their sum
(`prove` shows that they are summed); going on with what it keeps gathered between passes, or keeps whole because it is
small, after a share has changed; leaving a gradient of the last step where a parameter has none in this one; letting
its list of modules whose forward pass is under way grow by those that a second forward pass leaves early.
"""

import os
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from masters.config import Train
from masters.models.distributed import mixed_precision
from masters.models.distributed.base import prove

T = TypeVar("T")
BUCKET = 2**25  # numbers: of gradients that are scattered at once, and of weights that are gathered ahead


class Zero3:
    """Shares of weights on a process group that is there already (see `base.Sharding`).

    Products in bfloat16 are autocast's, as replicas have them.
    """

    lockstep = True

    def __init__(self, device: str) -> None:
        self._device, kind, index = device, torch.device(device).type, torch.device(device).index
        os.environ |= dict(DS_ACCELERATOR=kind, LOCAL_RANK=str(index or 0))
        if kind == "cuda":
            torch.cuda.set_device(device)
        else:
            from deepspeed import ops

            ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that it would compile; gloo does without
        # of each collective call: DeepSpeed uses names that PyTorch has newer ones for
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        self._mesh = init_device_mesh(kind, (dist.get_world_size(),))
        self._engines: dict[torch.nn.Module, Any] = {}
        self._shares: dict[torch.nn.Module, dict[str, torch.nn.Parameter]] = {}
        self._shapes: dict[torch.Tensor, torch.Size] = {}
        self._idle = 0  # how long DeepSpeed's list of modules under way is between passes
        prove(self, "zero3", device)
        for of_model in (self._engines, self._shares, self._shapes):
            of_model.clear()  # what was proven on needs no memory any more

    def hold(self, model: torch.nn.Module, train: Train | None = None) -> torch.nn.Module:
        import deepspeed
        from deepspeed.runtime.zero import parameter_offload

        if train:
            mixed_precision.computing(model, train)
        model.forward = MethodType(lambda itself, work: work(itself), model)
        settings = _settings(model)
        # one weight after the other: `initialize` would first put all of them on the device
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=next(model.parameters()).dtype)
        # an optimiser makes it scatter gradients; this one has no states, and never steps
        scatters = torch.optim.SGD(model.parameters(), lr=0.0) if train else None
        made = deepspeed.initialize(
            model=model.to(self._device), optimizer=scatters, config=settings, dist_init_required=False
        )
        self._idle, engine = len(parameter_offload.FWD_MODULE_STACK), cast(Any, made[0])
        for copy in engine.optimizer.fp32_partitioned_groups_flat if train else ():
            copy.data = copy.new_empty(0)  # the weights that its optimiser would step on
        for weight in _outside(model):
            deepspeed.zero.register_external_parameter(model, weight)
        self._engines[model] = engine
        self._shares[model] = {name: self._share(parameter) for name, parameter in model.named_parameters()}
        return model

    def held(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        self._release(model)
        return self._shares[model]

    def within(self, model: torch.nn.Module, work: Callable[[torch.nn.Module], T]) -> T:
        found = self._engines[model](work)
        if not torch.is_grad_enabled() and hasattr(model, "lm_head"):
            cast(Any, model).lm_head.weight.all_gather()  # the pass has released it
        return found

    def sum_gradients(self, model: torch.nn.Module) -> None:
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for name, parameter in model.named_parameters():
            share, mean = self._shares[model][name], safe_get_local_grad(parameter)
            if mean is None:  # it is not trained
                continue
            share.grad = self._flat((mean * dist.get_world_size()).to(share.dtype), parameter)
            safe_set_local_grad(parameter, torch.zeros_like(mean))
        self._engines[model].optimizer.zero_grad()  # the next pass is the first of a step
        self._release(model)

    def whole(self, part: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        return part.full_tensor().view(self._shapes[like]) if isinstance(part, DTensor) else part

    def part(self, whole: torch.Tensor, like: torch.nn.Parameter) -> torch.Tensor:
        # every rank has the whole, so that nothing is sent
        return distribute_tensor(whole.flatten(), self._mesh, [Shard(0)], src_data_rank=None)

    def _share(self, parameter: Any) -> torch.nn.Parameter:
        share = torch.nn.Parameter(self._flat(parameter.ds_tensor.detach(), parameter), parameter.requires_grad)
        self._shapes[share] = parameter.ds_shape
        return share

    def _flat(self, padded: torch.Tensor, parameter: Any) -> DTensor:
        """This rank's share as part of the flattened whole; DeepSpeed pads the last ones."""
        total, size = parameter.ds_numel, len(padded)
        own = max(0, min(size, total - dist.get_rank() * size))
        return DTensor.from_local(
            padded[:own], self._mesh, [Shard(0)], run_check=False, shape=torch.Size([total]), stride=(1,)
        )

    def _release(self, model: torch.nn.Module) -> None:
        """Nothing is under way: what is gathered, as the head's weight still is, is to be gathered anew."""
        from deepspeed.runtime.zero import parameter_offload

        self._engines[model].optimizer.empty_partition_cache()
        del parameter_offload.FWD_MODULE_STACK[self._idle :]


def _outside(model: Any) -> list[torch.nn.Parameter]:
    """Weights that are used outside of their modules: the head's by our own pass over the vocabulary, the embedding's
    for an image's token that a response wrote."""
    return [model.lm_head.weight, model.get_input_embeddings().weight] if hasattr(model, "lm_head") else []


def _settings(model: torch.nn.Module) -> dict[str, Any]:
    """DeepSpeed's configuration: all weights shared, the smallest too, and gathered no longer than they are used."""
    bucket = min(BUCKET, sum(parameter.numel() for parameter in model.parameters()))
    zero = dict(
        stage=3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0,
        reduce_bucket_size=bucket, stage3_prefetch_bucket_size=bucket, sub_group_size=bucket,
        overlap_comm=False,  # else what it gathers does not wait for AdamW's step on the shares
    )  # fmt: skip
    return dict(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=1, zero_allow_untested_optimizer=True,
        zero_optimization=zero, bf16=dict(enabled=next(model.parameters()).dtype == torch.bfloat16),
    )  # fmt: skip
