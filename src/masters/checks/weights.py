"""Whether a model folder can be used, before an engine or a trainer starts: weights that are finite and shaped as it
says, and, for our families, a processor that makes prompts (`processor`).

Weights are read once, tensor by tensor. What was found sound is noted on this machine under the folder's digest, so
that the next run neither reads them again nor imports the model's code.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from masters.checks.processor import ProcessorOutput, run_processor
from masters.common.errors import InputError
from masters.common.machine import cache_folder
from masters.models.masking import is_masked
from masters.models.model_loading import parameter_names

VERSION = 3  # of the checks
LAYERS = ("num_hidden_layers", "num_layers", "depth", "n_layer")  # what configurations call the number of blocks
INDEX = "model.safetensors.index.json"

MASKABLE = {"BF16", "F16", "F32"}  # as files call them

Shapes = dict[str, tuple[int, ...]]


def check_weights(folder: Path, digest: str, shaped: bool) -> ProcessorOutput | None:
    """Raises InputError that names what is at fault, a tensor with its file. `digest` is the folder's.

    `shaped`: also compare every tensor with the model that the configuration describes, and probe the processor; for
    models of our families. Returns what the probe found.
    """
    import transformers

    note = cache_folder() / "sound" / f"{digest}-{VERSION}-{transformers.__version__}-{'shaped' if shaped else 'finite'}"
    if (known := _noted(note)) is not None:
        return ProcessorOutput(**known) if shaped else None
    _check_index(folder)
    probed = None
    if shaped:
        check_shapes(folder)
        probed = run_processor(folder)
    check_finite(folder)
    _write(note, asdict(probed) if probed else {})
    return probed


def check_finite(folder: Path) -> None:
    """No NaN and no infinity: either makes every answer and every mask threshold meaningless. Raises InputError."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
        for name in names:
            with safe_open(file, "pt") as opened:  # for each: a mapping that stays would keep every page read so far
                tensor = opened.get_tensor(name)
            if found := _not_finite(tensor):
                raise InputError(f"weights {file}: tensor {name} holds {found}: the model is damaged, fetch it again")


def check_shapes(folder: Path) -> None:
    """Every parameter of the model that config.json describes is there, in its shape. Raises InputError."""
    saved = saved_shapes(folder)
    model = _described(folder, len(saved))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    named = {now: (old, shape) for (old, shape), now in zip(saved.items(), _names(model, saved), strict=True)}
    for name, shape in expected.items():
        old, found = named.get(name, (name, None))
        if found is not None and found != shape:
            raise InputError(
                f"model {folder}: config.json asks for {old} of shape {list(shape)}, its weights hold {list(found)}"
            )
    missing = sorted(expected.keys() - named.keys() - set(getattr(model, "all_tied_weights_keys", {})))
    if missing:
        raise InputError(
            f"model {folder}: its weights lack {len(missing)} tensors that config.json asks for (first: {missing[0]})"
        )


def check_maskable(folder: Path, exclude: tuple[str, ...]) -> None:
    """Something can be masked, and thresholds of it can be taken. Raises InputError."""
    kinds: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                if is_masked(name, len(part.get_shape()), exclude):
                    kinds.setdefault(part.get_dtype(), name)
    if not kinds:
        raise InputError(f"model {folder}: no tensor is left to mask (mask.exclude: {list(exclude)}); set r_max = 0")
    if strange := kinds.keys() - MASKABLE:
        kind = min(strange)
        raise InputError(
            f"model {folder}: tensor {kinds[kind]} is of type {kind}, masks are taken of "
            f"{', '.join(sorted(MASKABLE))}; save it in one of these, or add it to mask.exclude"
        )
    if len(kinds) > 1:
        raise InputError(
            f"model {folder}: tensors to be masked are of several types ({', '.join(sorted(kinds))}): save it in one"
        )


def saved_shapes(folder: Path) -> Shapes:
    """By name, from the files' headers alone."""
    shapes: Shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in sorted(opened.keys())}
    return shapes


def _described(folder: Path, tensors: int) -> torch.nn.Module:
    """The model that config.json describes, without memory behind it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        blocks = _blocks(json.loads((folder / "config.json").read_text()))
        if blocks > tensors:
            raise ValueError(f"it asks for {blocks} layers, the weights are {tensors} tensors")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        said = " ".join(str(error).split())[:300]
        raise InputError(f"model {folder}: its config.json describes no model ({said})") from error


def _blocks(config: Any) -> int:
    """The largest number of layers that is asked for anywhere: a model without end would be built for ever."""
    if not isinstance(config, dict):
        return 0
    own = [value for key, value in config.items() if key in LAYERS and isinstance(value, int)]
    return max([0, *own, *(_blocks(value) for value in config.values())])


def _names(model: torch.nn.Module, saved: Shapes) -> list[str]:
    names = parameter_names(model, saved)
    return [names[name] for name in saved]


def _not_finite(tensor: torch.Tensor) -> str | None:
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    # one pass, no copy; types of 8 bits are widened: they know no minimum
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.to(torch.float32))
    if low.isnan():
        return "NaN"
    return "infinity" if low.isinf() or high.isinf() else None


def _check_index(folder: Path) -> None:
    """An index may name files of the folder alone: others would be loaded without being part of its identity."""
    if not (folder / INDEX).is_file():
        return
    try:
        files = {str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"model {folder}: {INDEX} is no index of weights ({error})") from error
    there = {file.name for file in folder.glob("*.safetensors")}
    if strange := sorted(files - there):
        raise InputError(
            f"model {folder}: {INDEX} names {strange[0]!r:.200}, which is not a weights file of its folder"
        )


def _noted(note: Path) -> dict[str, Any] | None:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None


def _write(note: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: another run may read it now."""
    note.parent.mkdir(parents=True, exist_ok=True)
    temporary = note.with_name(f".{note.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, note)
