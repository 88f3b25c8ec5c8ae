"""Local model folders: what they hold, their identity, and loading them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from masters.common.errors import InputError
from masters.models.distributed import Replicate, Sharding, to_local
from masters.models.families.base import VLM
from masters.models.masking import apply_mask, copy_masked, safetensors_tensors

Hold = Callable[[torch.nn.Module], torch.nn.Module]
REPLICATE = Replicate()
# never fetched from the hub: formats that run code when they are opened, or that nothing here reads
UNWANTED = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]


def resolve(model: str, revision: str | None) -> Path:
    """The local folder of a model: a folder as it is, a hub id downloaded. Raises InputError."""
    folder = Path(model).resolve() if Path(model).is_dir() else _download(model, revision)
    for needed in ("config.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise InputError(f"model {model}: expected {needed} in its folder, found none")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"model {model}: expected safetensors weights in its folder, found none")
    return folder


def _download(model: str, revision: str | None) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"model folder not found: {model}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise InputError(
            f"model {model} is neither a folder nor reachable on the hub ({type(error).__name__})"
        ) from error


def check_readable(folder: Path) -> None:
    """Every safetensors file opens and holds what its header says. Raises InputError."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                list(tensors.keys())
        except Exception as error:
            raise InputError(f"weights {file} cannot be read: {error}") from error


def load_model(folder: Path, dtype: str, device: str = "cpu", hold: Hold | None = None) -> VLM:
    """The model in `dtype`, in evaluation mode (nothing in these families' training depends on the mode).

    Text attention on a GPU skips the blocks that a packed row's mask leaves empty. `hold`: puts it on the device, as a
    way of sharding does; as a whole without.
    """
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention(device),
        use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    return (hold or Replicate(device).shard_model)(model).eval()


def attention(device: str) -> dict[str, str]:
    """The model's attention, and its text model's, on a device."""
    from masters.models.packing import flex_attention

    return {"": "sdpa", "text_config": flex_attention.NAME if device.startswith("cuda") else "sdpa"}


@torch.no_grad()
def remask(model: torch.nn.Module, folder: Path, thresholds: dict[str, float], sharding: Sharding = REPLICATE) -> None:
    """Set every tensor of `thresholds` again, masked below its threshold (Eq. 1-2), in the model's own storage.

    The checkpoint's tensors are read one by one and copied in slices: at no time is more than one of them held beside
    the model. Masks are taken on their values there, before any change of type, as the engine takes them; each rank
    takes those of what it holds. Raises InputError for a tensor that the model does not have.
    """
    parameters, named = sharding.local_parameters(model), parameter_names(model, thresholds.keys())
    unknown = {name for name in thresholds if named[name] not in parameters}
    if unknown:
        raise InputError(
            f"model {folder}: {len(unknown)} masked tensors are no parameters of it (first: {min(unknown)})"
        )
    for name, tensor in safetensors_tensors(folder, thresholds.keys()):
        parameter = parameters[named[name]]
        copy_masked(to_local(parameter), to_local(sharding.shard(tensor, parameter)), thresholds[name])


def parameter_names(model: VLM, saved: Iterable[str]) -> dict[str, str]:
    """What transformers calls the tensors that a checkpoint calls `saved`: some families' files keep older names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    now = dict(model.named_parameters())
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    return {
        name: name if name in now else rename_source_key(name, renamings, [], model.base_model_prefix, now)[0]
        for name in saved
    }


def masked_tensors(folder: Path, thresholds: dict[str, float]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors, masked where `thresholds` names them, one at a time."""
    for name, tensor in safetensors_tensors(folder):
        yield name, apply_mask(tensor, thresholds[name]) if thresholds.get(name, 0.0) > 0 else tensor


def export(trained: dict[str, torch.Tensor], source: Path, out: Path) -> None:
    """A Hugging Face folder in the data type of the student it came from, with its processor and tokenizer.

    `trained`: the student's parameters, whole.
    """
    from transformers import AutoProcessor

    dtype = next(tensor.dtype for _, tensor in safetensors_tensors(source) if tensor.is_floating_point())
    student = load_model(source, str(dtype).removeprefix("torch."))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(trained.pop(name))
    student.save_pretrained(out)
    AutoProcessor.from_pretrained(source, trust_remote_code=False).save_pretrained(out)
