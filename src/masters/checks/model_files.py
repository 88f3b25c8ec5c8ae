"""Checks of the files in a model's folder, before any is loaded: missing ones, Git LFS pointers, adapters, strays."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from masters.common.errors import InputError, one_line
from masters.common.hashing import IDENTITY_SUFFIXES

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the first bytes of the text that stands for a large file
ADAPTER_FILE = re.compile(r"adapter.*\.(json|safetensors|bin)")
ADAPTER_TENSOR = re.compile(r"^base_model\.|\.(base_layer|lora_\w+)(\.|$)", re.IGNORECASE)
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
REMEDY = "copy it from the base model, or download the model again"


def check_files(model: str, folder: Path) -> None:
    """Raise InputError for files that no model of any family can be loaded from. `model`: as the user named it."""
    check_pointers(model, folder)
    check_adapter_files(model, folder)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"model {model}: expected {name} in its folder, found none: {REMEDY}")
    if not any(folder.glob("*.safetensors")):
        found = min((file.name for file in folder.iterdir() if file.suffix in OTHER_WEIGHTS), default="none")
        raise InputError(
            f"model {model}: expected safetensors weights in its folder, found {found}: save it again in that "
            "format (transformers' save_pretrained), or download the model again"
        )


def check_pointers(model: str, folder: Path) -> None:
    """Raise InputError if a file is Git LFS's pointer to it: a clone without LFS has these in place of large files."""
    for file in sorted(folder.iterdir()):
        if not file.name.endswith(IDENTITY_SUFFIXES) or not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(
                    f"model {model}: {file.name} is a Git LFS pointer, not the file itself: run `git lfs pull` in the "
                    "clone, or download the model again"
                )


def check_adapter_files(model: str, folder: Path) -> None:
    """Raise InputError if the folder is an adapter (such as LoRA's) or has one beside a model's weights."""
    names = sorted(file.name for file in folder.iterdir() if ADAPTER_FILE.fullmatch(file.name))
    if not names:
        return
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    of_base = f" of {base!r:.200}" if isinstance(base, str) else ""
    if any(not ADAPTER_FILE.fullmatch(file.name) for file in folder.glob("*.safetensors")):
        raise InputError(
            f"model {model}: its folder also holds an adapter{of_base} ({', '.join(names)}): merge it into the "
            "weights (PEFT's merge_and_unload), or remove its files"
        )
    raise InputError(
        f"model {model}: an adapter{of_base} ({', '.join(names)}), expected a whole model: merge it into its base "
        "model (PEFT's merge_and_unload), save that, and name its folder"
    )


def check_adapter_tensors(folder: Path) -> None:
    """Raise InputError if weights files hold an adapter's tensors, under whatever name the file was saved."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found = next((name for name in sorted(opened.keys()) if ADAPTER_TENSOR.search(name)), None)
        if found:
            raise InputError(
                f"model {folder}: {file.name} holds tensors of an adapter ({found}): merge it into the weights (PEFT's "
                "merge_and_unload) and save the model again, or remove the file if it is a stray one"
            )


def check_unquantized(model: str, folder: Path) -> None:
    """Raise InputError if a model is published with quantized weights, which can be neither masked nor trained here."""
    if method := quantization_method(folder):
        raise InputError(
            f"model {model}: config.json says that its weights are quantized ({method:.50}), expected weights in "
            "bfloat16, float16 or float32: take the model that it was made from"
        )


def quantization_method(folder: Path) -> str | None:
    """Return how config.json says that the weights are quantized; None if it says nothing of it."""
    config = _read_json(folder / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if quantization := part.get("quantization_config") or part.get("compression_config"):
            return repr(quantization.get("quant_method") if isinstance(quantization, dict) else quantization)
    return None


def check_index(folder: Path) -> None:
    """Raise InputError if the index names files that are not in the folder, where they belong to its identity."""
    if not _has(folder, INDEX):
        return
    if unknown := sorted(_read_index(folder) - _weight_files(folder)):
        raise InputError(
            f"model {folder}: {INDEX} names {unknown[0]!r:.200}, which is not a weights file of its folder: copy that "
            "file into it, or download the model again"
        )


def check_stray_weights(folder: Path) -> None:
    """Raise InputError for weights that transformers does not read: masks and engines would take them for the model's.

    It reads `model.safetensors`, else what the index names.
    """
    present = _weight_files(folder)
    if not _has(folder, INDEX) and WEIGHTS not in present:
        raise InputError(f"model {folder}: expected {WEIGHTS}, or {INDEX} for {min(present)}, found none: {REMEDY}")
    named = _read_index(folder) if _has(folder, INDEX) else {WEIGHTS}
    if stray := sorted(present - named):
        reason = f"{INDEX} does not name it" if _has(folder, INDEX) else f"{WEIGHTS} is the whole model"
        raise InputError(f"model {folder}: its folder also holds {stray[0]}, but {reason}: remove the one or the other")


def check_supported_files(folder: Path) -> None:
    """Raise InputError naming the file of tokenizer, image processor or chat template that a folder lacks."""
    if not _has(folder, "tokenizer.json") and not (_has(folder, "vocab.json") and _has(folder, "merges.txt")):
        raise _missing(folder, "tokenizer.json (or vocab.json and merges.txt)")
    if not _has(folder, "preprocessor_config.json"):
        if not _has(folder, "processor_config.json"):
            raise _missing(folder, "processor_config.json (or preprocessor_config.json)")
        # a list or broken JSON is a fault of its own
        processor = _read_json(folder / "processor_config.json")
        if processor and "image_processor" not in processor:
            raise _missing(folder, "preprocessor_config.json (its processor_config.json has no image_processor)")
    template_files = ("chat_template.jinja", "chat_template.json")
    configs = (_read_json(folder / f"{name}_config.json") for name in ("processor", "tokenizer"))
    if not any(_has(folder, name) for name in template_files) and not any("chat_template" in c for c in configs):
        raise _missing(folder, "chat_template.jinja (or chat_template.json)")


def _weight_files(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.safetensors")}


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()


def _missing(folder: Path, names: str) -> InputError:
    return InputError(f"model {folder}: expected {names} in its folder, found none: {REMEDY}")


def _read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_index(folder: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads((folder / INDEX).read_text())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"model {folder}: {INDEX} is no index of weights ({one_line(error)}): {REMEDY}") from error
