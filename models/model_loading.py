"""Local model folders: finding, checking, loading and masking them, and exporting a trained student."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from masters.common.errors import InputError
from masters.common.files import describe_place
from masters.models.distributed import Replicate, Sharding, to_local
from masters.models.families.base import VLM
from masters.models.masking import apply_mask, copy_masked, iterate_tensors

# of a student's generation_config.json: its special tokens, what transformers notes itself, and what changes no answer
KEPT_GENERATION_SETTINGS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "_from_model_config",
    "transformers_version",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
}
ShardModel = Callable[[torch.nn.Module], torch.nn.Module]
REPLICATE = Replicate()
# never fetched from the hub: formats that run code when opened, or that are not read here
UNSAFE_FILES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]


def resolve_model_folder(model: str, revision: str | None) -> Path:
    """Return the local folder of a model; a hub id is downloaded. Raises InputError if there is none.

    A revision names a commit of the hub; with a folder it is refused.
    """
    if not Path(model).is_dir():
        return _download(model, revision)
    if revision:
        raise InputError(f"revision applies to hub models only; model {model} is a folder: remove its revision")
    return Path(model).resolve()


def _download(model: str, revision: str | None) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"model folder not found: {describe_place(model)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=UNSAFE_FILES))
    except Exception as error:  # the hub client raises many kinds; to the user most mean the same
        if isinstance(error, OSError) and error.filename:
            raise InputError(f"model {model} cannot be stored: {error}; HF_HOME names another folder") from error
        raise InputError(
            f"model {model} is neither a folder in {Path.cwd()} nor reachable on the hub ({type(error).__name__})"
        ) from error


def check_readable(folder: Path) -> None:
    """Raises InputError unless every safetensors file opens and holds what its header says."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                list(tensors.keys())
        except Exception as error:
            raise InputError(
                f"weights {file} cannot be read ({error}): it is damaged or incomplete, download the model again"
            ) from error


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shapes of a checkpoint's tensors by name, read from the files' headers alone."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in sorted(tensors.keys())}
    return shapes


def load_model(folder: Path, dtype: str, device: str = "cpu", shard_model: ShardModel | None = None) -> VLM:
    """Load a model in `dtype` and evaluation mode (no layer of these families trains differently in training mode).

    On a GPU, text attention skips empty blocks of a packed row's mask. `shard_model`: moves the loaded model to the
    device; by default every rank holds it whole.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation=attention_implementation(device),
        use_safetensors=True,
        trust_remote_code=False,
    )
    return (shard_model or Replicate(device).shard_model)(model).eval()


def attention_implementation(device: str) -> dict[str, str]:
    """Return the attention implementation of the model ("") and of its text model on a device."""
    from masters.models.packing import flex_attention

    return {"": "sdpa", "text_config": flex_attention.NAME if device.startswith("cuda") else "sdpa"}


@torch.no_grad()
def remask(model: torch.nn.Module, folder: Path, thresholds: dict[str, float], sharding: Sharding = REPLICATE) -> None:
    """Restore every tensor named in `thresholds` from the checkpoint, masked below its threshold (Eq. 1-2), in place.

    The checkpoint's tensors are read one by one and copied in chunks, so that at most one is held beside the model.
    Masks are computed from the checkpoint's values before any change of type, as the engine does; each rank masks its
    own part. Raises InputError for a tensor that the model does not have.
    """
    parameters, names = sharding.local_parameters(model), parameter_names(model, thresholds.keys())
    unknown = {name for name in thresholds if names[name] not in parameters}
    if unknown:
        raise InputError(
            f"model {folder}: {len(unknown)} masked tensors are not parameters of the model (first: {min(unknown)})"
        )
    for name, tensor in iterate_tensors(folder, thresholds.keys()):
        parameter = parameters[names[name]]
        copy_masked(to_local(parameter), to_local(sharding.shard(tensor, parameter)), thresholds[name])


def parameter_names(model: VLM, checkpoint_names: Iterable[str]) -> dict[str, str]:
    """Map a checkpoint's tensor names to the model's parameter names: some families' files keep older names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    parameters = dict(model.named_parameters())
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    prefix = model.base_model_prefix
    return {
        name: name if name in parameters else rename_source_key(name, renamings, [], prefix, parameters)[0]
        for name in checkpoint_names
    }


def iterate_masked_tensors(folder: Path, thresholds: dict[str, float]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a checkpoint, one at a time, masked where `thresholds` has a threshold above 0."""
    for name, tensor in iterate_tensors(folder):
        yield name, apply_mask(tensor, thresholds[name]) if thresholds.get(name, 0.0) > 0 else tensor


def export_student(trained: dict[str, torch.Tensor], source: Path, destination: Path) -> list[str]:
    """Write a Hugging Face folder with the trained parameters, in the type of the student in `source`.

    The processor and tokenizer come from `source`. `trained`: full parameters by name; emptied to save memory. Returns
    the settings of generation that were left out (`drop_generation_settings`).
    """
    from transformers import AutoProcessor

    dtype = next(tensor.dtype for _, tensor in iterate_tensors(source) if tensor.is_floating_point())
    student = load_model(source, str(dtype).removeprefix("torch."))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(trained.pop(name))
    dropped = drop_generation_settings(student)
    student.save_pretrained(destination)
    AutoProcessor.from_pretrained(source, trust_remote_code=False).save_pretrained(destination)
    return dropped


def drop_generation_settings(model: VLM) -> list[str]:
    """Leave a model's generation config without limits and sampling, which belong to no weights. Returns their names.

    A user of the trained student would meet a length limit, suppressed tokens or a sampling that its training and
    evaluation never used.
    """
    from transformers import GenerationConfig

    settings = model.generation_config.to_diff_dict()
    dropped = sorted(settings.keys() - KEPT_GENERATION_SETTINGS)
    if dropped:
        model.generation_config = GenerationConfig(**{k: v for k, v in settings.items() if k not in dropped})
    return dropped
