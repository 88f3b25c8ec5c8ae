"""Checkpoints of a training run, each one file, named after its step and its SHA-256.

A checkpoint holds all that later steps depend on: weights, AdamW's state of every parameter, and torch's random state.
The position in the data is the step, because steps are planned from the seed alone. A checkpoint also lists the part
files of the tables written before it; it is refused if one of them is missing.

Tensors are stored whole, so that any number of ranks with any sharding can resume.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from masters.common.errors import ArtifactError
from masters.common.hashing import digest
from masters.models.distributed import Replicate, Sharding
from masters.models.distributed.collectives import broadcast_from_rank0, gather_to_rank0
from masters.models.training import history
from masters.store.storage import Storage

MAX_KEPT = 2
NAME = re.compile(r"/step-(\d{8})-([0-9a-f]{64})\.safetensors$")
REPLICATE = Replicate()
HEADER = "masters"  # key in the safetensors metadata
Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose content has the SHA-256 in its name."""

    name: str
    step: int
    tensors: dict[str, torch.Tensor]


def save(
    storage: Storage,
    prefix: str,
    step: int,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    sharding: Sharding = REPLICATE,
) -> None:
    """Save the state after `step` steps; keep the last two checkpoints only. All ranks call it, rank 0 writes."""
    parameter_of = {f"weight/{name}": parameter for name, parameter in parameters.items()}
    local_tensors: dict[str, torch.Tensor] = dict(parameter_of)
    for name, parameter in parameters.items():
        # a parameter that never had a gradient has no state; each has its own step count
        for key, value in optimizer.state.get(parameter, {}).items():
            local_tensors[f"adamw/{key}/{name}"], parameter_of[f"adamw/{key}/{name}"] = value, parameter
    tensors = gather_to_rank0(sharding, local_tensors, parameter_of)
    if not tensors:
        return
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    data = save_safetensors(tensors, {HEADER: json.dumps(dict(step=step, parts=history.parts(storage, prefix)))})
    storage.write(f"{prefix}/step-{step:08d}-{digest(data)}.safetensors", data)
    for old in _names(storage, prefix)[:-MAX_KEPT]:
        storage.remove(old)


def newest(storage: Storage, prefix: str) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint, and the reason for each newer one that is refused, which is removed."""
    refused = []
    for name in reversed(_names(storage, prefix)):
        try:
            return read(storage, name), refused
        except ArtifactError as error:
            refused.append(str(error))
            storage.remove(name)
    return None, refused


def read_end_state(storage: Storage, prefix: str, step: int) -> Checkpoint:
    """Read the state after `step` steps that the previous part of the round ended with.

    Raises ArtifactError if it is missing or is not what was written.
    """
    states = [read(storage, name) for name in _names(storage, prefix)]
    if [state.step for state in states] != [step]:
        found = ", ".join(f"step {state.step}" for state in states) or "none"
        raise ArtifactError(
            f"{storage.uri(prefix)}: expected the state after step {step}, found {found}; train the previous mask "
            "stage again with --rebuild train"
        )
    return states[0]


def read(storage: Storage, name: str) -> Checkpoint:
    """Read and verify a checkpoint. Raises ArtifactError if it is damaged or a part file before it is missing."""
    data, match = storage.read(name), NAME.search(name)
    assert match
    step, expected = int(match[1]), match[2]
    if (found := digest(data)) != expected:
        raise ArtifactError(f"checkpoint {storage.uri(name)} is damaged: expected SHA-256 {expected}, found {found}")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER])
    present = set(history.parts(storage, name.rsplit("/", 1)[0]))
    if missing := [part for part in header["parts"] if part not in present]:
        raise ArtifactError(
            f"checkpoint {storage.uri(name)} is refused: {len(missing)} files with rows of earlier steps are missing "
            f"(first: {missing[0]})"
        )
    return Checkpoint(name, step, load_safetensors(data))


def restore(
    checkpoint: Checkpoint | None,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    sharding: Sharding = REPLICATE,
) -> None:
    """Restore weights, optimizer and random state, bit for bit. All ranks call it; rank 0 has the checkpoint."""
    optimizer.state.clear()
    with torch.no_grad():
        for name, value in broadcast_from_rank0(checkpoint.tensors if checkpoint else {}):
            kind, _, rest = name.partition("/")
            if kind == "weight":
                parameters[rest].copy_(sharding.shard(value, parameters[rest]))
            elif kind == "adamw":
                key, _, parameter_name = rest.partition("/")
                parameter = parameters[parameter_name]
                # AdamW keeps its step count on the CPU, unsharded
                state = value if key == "step" else sharding.shard(value, parameter).to(parameter.device)
                optimizer.state[parameter][key] = state.clone()
            elif rest == "cpu":
                torch.set_rng_state(value)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(value)


def _names(storage: Storage, prefix: str) -> list[str]:
    """Return the names of checkpoint files, in order of steps. Files with other names are ignored."""
    return [name for name in storage.names(prefix) if NAME.search(name)]
