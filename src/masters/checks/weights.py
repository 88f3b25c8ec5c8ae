"""Checks of a model folder before an engine or a trainer starts: finite weights of the right shapes, and its processor.

The weights are read once, tensor by tensor. A passed check is noted in this machine's cache under the folder's
digest, so that the next run neither reads the weights nor imports the model's code again.
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from masters.checks.model_files import REMEDY, check_index, check_stray_weights, check_supported_files
from masters.checks.processor import ProcessorOutput, run_processor
from masters.common.errors import InputError, one_line
from masters.common.files import write_atomically
from masters.common.machine import cache_folder
from masters.models.masking import is_masked
from masters.models.model_loading import parameter_names, tensor_shapes

VERSION = 9  # of the checks; part of the cache key
LAYER_KEYS = ("num_hidden_layers", "num_layers", "depth", "n_layer")  # keys for the number of blocks in configurations
MASKABLE_DTYPES = {"BF16", "F16", "F32"}  # as named in safetensors files
LOADABLE_DTYPES = MASKABLE_DTYPES | {"F64"}


def check_weights(folder: Path, digest: str, is_supported: bool) -> ProcessorOutput | None:
    """Raise InputError naming the fault, such as a tensor and its file. `digest` is the folder's.

    `is_supported`: the model belongs to a supported family and is not quantized. Then all shapes are compared with the
    configuration, and the processor is run; its output is returned.
    """
    import transformers

    scope = "shaped" if is_supported else "finite"
    note = cache_folder() / "sound" / f"{digest}-{VERSION}-{transformers.__version__}-{scope}"
    if (noted := _read_note(note)) is not None:
        return ProcessorOutput(**noted) if is_supported else None
    check_index(folder)
    output = None
    if is_supported:
        check_stray_weights(folder)
        check_supported_files(folder)
        check_shapes(folder)
        output = run_processor(folder)
    check_finite(folder)
    with suppress(OSError):  # without a writable cache folder, the next run checks again
        write_atomically(note, json.dumps(asdict(output) if output else {}))
    return output


def check_finite(folder: Path) -> None:
    """Raise InputError if a weight is NaN or infinite: it would make every answer and mask threshold meaningless."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = sorted(opened.keys())
        for name in names:
            with safe_open(file, "pt") as opened:  # opened per tensor: a lasting mapping would keep all pages in memory
                tensor = opened.get_tensor(name)
            if value := _non_finite_value(tensor):
                raise InputError(
                    f"weights {file}: tensor {name} holds {value}: the file is damaged, download the model again"
                )


def check_shapes(folder: Path) -> None:
    """Raise InputError unless the weights are the parameters of the model in config.json, in their shapes."""
    saved = {name: tuple(shape) for name, shape in tensor_shapes(folder).items()}
    model = _build_empty_model(folder, len(saved))
    _check_architecture(folder, type(model).__name__)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = parameter_names(model, saved)
    _check_engine_names(folder, names)
    by_parameter = {names[name]: (name, shape) for name, shape in saved.items()}
    for parameter, shape in expected.items():
        name, found = by_parameter.get(parameter, (parameter, shape))
        if found != shape:
            raise InputError(
                f"model {folder}: config.json asks for {name} of shape {list(shape)}, its weights hold {list(found)}: "
                f"{REMEDY}"
            )
    _check_types(folder, {name for name, parameter in names.items() if parameter in expected})
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if unknown := sorted(by_parameter.keys() - expected.keys() - tied - dict(model.named_buffers()).keys()):
        raise InputError(
            f"model {folder}: its weights hold {len(unknown)} tensors that the model in config.json has no place for "
            f"(first: {by_parameter[unknown[0]][0]}), which an engine refuses: {REMEDY}"
        )
    if missing := sorted(expected.keys() - by_parameter.keys() - tied):
        raise InputError(
            f"model {folder}: its weights lack {len(missing)} tensors that config.json asks for (first: {missing[0]}): "
            f"{REMEDY}"
        )


def _check_architecture(folder: Path, name: str) -> None:
    """Raise InputError unless config.json names the model's class, by which an engine chooses its code."""
    listed = json.loads((folder / "config.json").read_text()).get("architectures")
    if listed != [name]:
        raise InputError(
            f'model {folder}: expected "architectures": ["{name}"] in config.json, by which an engine chooses its '
            f"code, found {listed or 'none'}: write it there, or take config.json from the base model"
        )


def _check_engine_names(folder: Path, names: dict[str, str]) -> None:
    """Raise InputError for weights of the inner model alone: transformers adds the prefix to them, an engine cannot."""
    for name, parameter in names.items():
        if name.startswith("language_model.") and parameter.endswith(f".{name}"):
            raise InputError(
                f"model {folder}: its weights hold {name}, an engine expects {parameter}: load the model with "
                "AutoModelForImageTextToText and save it again with save_pretrained"
            )


def _check_types(folder: Path, parameters: set[str]) -> None:
    """Raise InputError for quantized parameters: without their scales, loaders would convert them to wrong weights."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(parameters.intersection(opened.keys())):
                if (dtype := opened.get_slice(name).get_dtype()) not in LOADABLE_DTYPES:
                    raise InputError(
                        f"model {folder}: tensor {name} is of type {dtype}, expected weights in bfloat16, float16 or "
                        "float32: take the model that the quantized one was made from"
                    )


def check_maskable(folder: Path, exclude: tuple[str, ...]) -> None:
    """Raise InputError if no tensor can be masked, or if the tensors to mask have an unsupported or mixed type."""
    example_by_dtype: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                part = opened.get_slice(name)
                if is_masked(name, len(part.get_shape()), exclude):
                    example_by_dtype.setdefault(part.get_dtype(), name)
    if not example_by_dtype:
        raise InputError(f"model {folder}: no tensor is left to mask (mask.exclude: {list(exclude)}); set r_max = 0")
    if unsupported := example_by_dtype.keys() - MASKABLE_DTYPES:
        dtype = min(unsupported)
        raise InputError(
            f"model {folder}: tensor {example_by_dtype[dtype]} is of type {dtype}, only tensors of "
            f"{', '.join(sorted(MASKABLE_DTYPES))} can be masked; convert it, or add it to mask.exclude"
        )
    if len(example_by_dtype) > 1:
        raise InputError(
            f"model {folder}: tensors to be masked are of several types ({', '.join(sorted(example_by_dtype))}): "
            "convert the model to a single type"
        )


def _build_empty_model(folder: Path, tensors: int) -> torch.nn.Module:
    """Return the model that config.json describes, without memory for its weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        layers = _largest_layer_count(json.loads((folder / "config.json").read_text()))
        if layers > tensors:
            raise ValueError(f"it asks for {layers} layers, the weights are {tensors} tensors")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of errors
        raise InputError(f"model {folder}: its config.json describes no model ({one_line(error)}): {REMEDY}") from error


def _largest_layer_count(config: Any) -> int:
    """Return the largest number of layers in a nested configuration: building a huge model would never end."""
    if not isinstance(config, dict):
        return 0
    counts = [value for key, value in config.items() if key in LAYER_KEYS and isinstance(value, int)]
    return max([0, *counts, *(_largest_layer_count(value) for value in config.values())])


def _non_finite_value(tensor: torch.Tensor) -> str | None:
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    # aminmax needs one pass and no copy, but does not support types of 8 bits
    low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.to(torch.float32))
    if low.isnan():
        return "NaN"
    return "infinity" if low.isinf() or high.isinf() else None


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):
        return None
