"""Checkpoints of a training run: one object each, so whole or not there, named after its step and its SHA-256.

A checkpoint holds all that the steps behind it depend on: weights, AdamW's state of every parameter with its own count
of steps, torch's random state. The position in the data is its step, as steps are planned from the seed alone. It also
names the parts of the tables that it stands on: without one of them rows would be missing, and it is refused.

Tensors are whole in it, however the ranks hold them: any number of ranks, of any way of holding, goes on from it.
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

KEPT = 2
NAME = re.compile(r"/step-(\d{8})-([0-9a-f]{64})\.safetensors$")
REPLICATE = Replicate()
HEADER = "masters"  # the entry of a safetensors file's metadata
Parameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and is what its name says."""

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
    """Keep the state after `step` steps; of all checkpoints the last two stay. All ranks call it, one writes."""
    of = {f"weight/{name}": parameter for name, parameter in parameters.items()}
    held: dict[str, torch.Tensor] = dict(of)
    for name, parameter in parameters.items():
        # none for a parameter that never had a gradient; counts differ where some steps had none
        for key, value in optimizer.state.get(parameter, {}).items():
            held[f"adamw/{key}/{name}"], of[f"adamw/{key}/{name}"] = value, parameter
    tensors = gather_to_rank0(sharding, held, of)
    if not tensors:
        return
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    data = save_safetensors(tensors, {HEADER: json.dumps(dict(step=step, parts=history.parts(storage, prefix)))})
    storage.write(f"{prefix}/step-{step:08d}-{digest(data)}.safetensors", data)
    for old in _names(storage, prefix)[:-KEPT]:
        storage.remove(old)


def newest(storage: Storage, prefix: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be gone on with, and of the newer ones why each is refused."""
    refused = []
    for name in reversed(_names(storage, prefix)):
        try:
            return read(storage, name), refused
        except ArtifactError as error:
            refused.append(str(error))
            storage.remove(name)
    return None, refused


def handed_over(storage: Storage, prefix: str, step: int) -> Checkpoint:
    """The state after `step` steps that a training left for the part of its round that follows.

    Raises ArtifactError if it is not there, or is not what was written.
    """
    found = [read(storage, name) for name in _names(storage, prefix)]
    if [one.step for one in found] != [step]:
        there = ", ".join(f"step {one.step}" for one in found) or "none"
        raise ArtifactError(
            f"{storage.uri(prefix)}: expected the state after step {step}, found {there}; train the mask stage before "
            "it again with --rebuild train"
        )
    return found[0]


def read(storage: Storage, name: str) -> Checkpoint:
    """A checkpoint, proven. Raises ArtifactError if it is not what was written, or lacks what it stands on."""
    data, found = storage.read(name), NAME.search(name)
    assert found
    step, written = int(found[1]), found[2]
    if (now := digest(data)) != written:
        raise ArtifactError(f"checkpoint {storage.uri(name)} is damaged: expected SHA-256 {written}, found {now}")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][HEADER])
    there = set(history.parts(storage, name.rsplit("/", 1)[0]))
    if lost := [part for part in header["parts"] if part not in there]:
        raise ArtifactError(
            f"checkpoint {storage.uri(name)} is refused: of the rows before it {len(lost)} files are gone "
            f"(first: {lost[0]})"
        )
    return Checkpoint(name, step, load_safetensors(data))


def restore(
    checkpoint: Checkpoint | None,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    sharding: Sharding = REPLICATE,
) -> None:
    """Put its state back, bit for bit. All ranks call it; rank 0 has the checkpoint and hands its tensors out."""
    optimizer.state.clear()
    with torch.no_grad():
        for name, value in broadcast_from_rank0(checkpoint.tensors if checkpoint else {}):
            kind, _, rest = name.partition("/")
            if kind == "weight":
                parameters[rest].copy_(sharding.shard(value, parameters[rest]))
            elif kind == "adamw":
                key, _, of = rest.partition("/")
                like = parameters[of]
                # AdamW keeps its count of steps on the CPU, whole
                state = value if key == "step" else sharding.shard(value, like).to(like.device)
                optimizer.state[like][key] = state.clone()
            elif rest == "cpu":
                torch.set_rng_state(value)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(value)


def _names(storage: Storage, prefix: str) -> list[str]:
    """By step. What has another name, such as an earlier version's, is none."""
    return [name for name in storage.names(prefix) if NAME.search(name)]
