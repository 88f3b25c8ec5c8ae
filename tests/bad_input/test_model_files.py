"""Folders with missing, stray or stand-in files are refused before work, with one line that names the file and says
what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from masters.checks.model_files import INDEX, WEIGHTS
from masters.checks.model_folder import find_model
from masters.common.errors import InputError
from masters.config import Model

DEMO = Path(__file__).parents[2] / "demo/models/student"
CONFIG, TOKENIZER, PROCESSOR = "config.json", "tokenizer.json", "processor_config.json"
PREPROCESSOR, TEMPLATE = "preprocessor_config.json", "chat_template.jinja"
PART, ADAPTER, DESCRIPTION = "model-00001-of-00002.safetensors", "adapter_model.safetensors", "adapter_config.json"
BASE = "copy it from the base model"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use an empty cache of checked weights."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def remove_all(folder: Path) -> None:
    remove(*(file.name for file in folder.iterdir()))(folder)


def rename(name: str, other: str) -> Change:
    return lambda folder: (folder / name).rename(folder / other)


def copy(name: str, other: str) -> Change:
    return lambda folder: shutil.copy(folder / name, folder / other)


def write(name: str, content: str) -> Change:
    return lambda folder: (folder / name).write_text(content)


def write_index(*files: str) -> Change:
    return write(INDEX, json.dumps(dict(metadata={}, weight_map={f"tensor{n}": f for n, f in enumerate(files)})))


def change_config(**changes: object) -> Change:
    return lambda folder: write(CONFIG, json.dumps(json.loads((folder / CONFIG).read_text()) | changes))(folder)


def use_older_files(folder: Path) -> None:
    """Split the processor's configuration into the files that older releases of transformers wrote."""
    found = json.loads((folder / PROCESSOR).read_text())
    image_processor = found["image_processor"] | dict(processor_class=found["processor_class"])
    write(PREPROCESSOR, json.dumps(image_processor))(folder)
    write("chat_template.json", json.dumps(dict(chat_template=(folder / TEMPLATE).read_text())))(folder)
    remove(PROCESSOR, TEMPLATE)(folder)


def add_adapter(folder: Path, name: str = ADAPTER) -> None:
    """Add an adapter as PEFT saves it, of the type of the model's weights, so that masks would take it for weights."""
    description = dict(peft_type="LORA", base_model_name_or_path="org/Base-VL", r=8, target_modules=["q_proj"])
    write(DESCRIPTION, json.dumps(description))(folder)
    tensor = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({tensor: torch.zeros(8, 64, dtype=torch.bfloat16)}, folder / name)


def leave_adapter_unmerged(folder: Path) -> None:
    """Name a weight as PEFT does while an adapter is attached to its module."""
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name.replace(".weight", ".base_layer.weight")] = tensors.pop(name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def save_inner_model(folder: Path) -> None:
    """Name the weights as if the model without its head had been saved."""
    tensors = {name.removeprefix("model."): tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


MISSING: dict[str, tuple[Change, list[str]]] = {
    "weights": (remove(WEIGHTS), ["expected safetensors weights", "found none"]),
    "weights as pickles": (
        all_of(remove(WEIGHTS), write("pytorch_model-00001-of-00002.bin", "")),
        ["expected safetensors weights", "found pytorch_model-00001-of-00002.bin", "save_pretrained"],
    ),
    "weights as GGUF": (
        all_of(remove(WEIGHTS), write("model-Q4_K_M.gguf", "")), ["expected safetensors", "found model-Q4_K_M.gguf"],
    ),
    "weights under their name": (rename(WEIGHTS, "x.safetensors"), [f"expected {WEIGHTS}", "for x.safetensors"]),
    "the index of parts": (rename(WEIGHTS, PART), [f"{INDEX} for {PART}", BASE]),
    "a part": (all_of(rename(WEIGHTS, PART), write_index(PART, "b.safetensors")), ["b.safetensors", "copy that file"]),
    "a part, which lies elsewhere": (
        write_index(WEIGHTS, "../x.safetensors"), ["'../x.safetensors'", "not a weights file of its folder"],
    ),
    "an index in the index": (write(INDEX, "[]"), ["is no index of weights"]),
    "config": (remove(CONFIG), [f"expected {CONFIG}", BASE]),
    "tokenizer config": (remove("tokenizer_config.json"), ["expected tokenizer_config.json", BASE]),
    "tokenizer": (remove(TOKENIZER), [f"expected {TOKENIZER}", BASE]),
    "half of an older tokenizer": (rename(TOKENIZER, "vocab.json"), [f"expected {TOKENIZER}", "merges.txt", BASE]),
    "processor": (remove(PROCESSOR), [f"expected {PROCESSOR}", BASE]),
    "image processor in its older file": (all_of(use_older_files, remove(PREPROCESSOR)), [f"or {PREPROCESSOR}", BASE]),
    "image processor under its name": (
        all_of(use_older_files, rename(PREPROCESSOR, "preprocessor.json")), [f"or {PREPROCESSOR}", BASE],
    ),
    "image processor in the processor's file": (
        write(PROCESSOR, '{"processor_class": "Qwen3VLProcessor"}'), [f"expected {PREPROCESSOR}", BASE],
    ),
    "chat template": (remove(TEMPLATE), [f"expected {TEMPLATE}", BASE]),
    "chat template in its older file": (
        all_of(use_older_files, remove("chat_template.json")), ["chat_template.json", BASE],
    ),
}  # fmt: skip
UNEXPECTED: dict[str, tuple[Change, list[str]]] = {
    "weights that Git LFS did not fetch": (write(WEIGHTS, POINTER), [WEIGHTS, "Git LFS pointer", "git lfs pull"]),
    "a part that Git LFS did not fetch": (
        all_of(write(PART, POINTER), write_index(WEIGHTS, PART)), [PART, "Git LFS pointer"],
    ),
    "a tokenizer that Git LFS did not fetch": (write(TOKENIZER, POINTER), [TOKENIZER, "Git LFS pointer"]),
    "a config that Git LFS did not fetch": (write(CONFIG, POINTER), [CONFIG, "Git LFS pointer"]),
    "an adapter alone": (
        all_of(remove_all, add_adapter), ["an adapter of 'org/Base-VL'", "expected a whole model", "merge"],
    ),
    "an adapter's weights alone": (
        all_of(remove_all, add_adapter, remove(DESCRIPTION)), [f"an adapter ({ADAPTER})", "expected a whole model"],
    ),
    "an adapter as a pickle": (
        all_of(remove_all, write("adapter_model.bin", "")), ["an adapter (adapter_model.bin)", "a whole model"],
    ),
    "an adapter beside the base model's files": (
        all_of(add_adapter, remove(WEIGHTS)), ["an adapter of 'org/Base-VL'", "expected a whole model"],
    ),
    "a stray adapter": (add_adapter, ["also holds an adapter of 'org/Base-VL'", ADAPTER, "merge", "or remove"]),
    "the description of a stray adapter": (
        all_of(add_adapter, remove(ADAPTER)), ["also holds an adapter", DESCRIPTION, "or remove"],
    ),
    "the weights of a stray adapter": (all_of(add_adapter, remove(DESCRIPTION)), ["also holds an adapter", ADAPTER]),
    "a stray adapter by another name": (
        all_of(lambda folder: add_adapter(folder, "lora.safetensors"), remove(DESCRIPTION)),
        ["lora.safetensors holds tensors of an adapter", "lora_A", "merge"],
    ),
    "an adapter that is not merged": (leave_adapter_unmerged, [f"{WEIGHTS} holds tensors of an adapter", "merge"]),
    "other weights": (copy(WEIGHTS, "before.safetensors"), ["also holds before.safetensors", "remove"]),
    "weights beside those of the index": (
        all_of(copy(WEIGHTS, PART), write_index(PART)), [f"also holds {WEIGHTS}", "does not name it"],
    ),
    "a page in place of weights": (write(WEIGHTS, "<!DOCTYPE html><p>Sign in"), [WEIGHTS, "download the model again"]),
    "half of the weights": (cut_weights, [WEIGHTS, "damaged or incomplete", "download the model again"]),
    "the inner model's weights": (save_inner_model, ["language_model.", "an engine expects model.", "save_pretrained"]),
    "broken adapter description": (write(DESCRIPTION, "["), ["also holds an adapter", DESCRIPTION]),
}  # fmt: skip
FAULTS = MISSING | UNEXPECTED


@pytest.mark.parametrize("name", FAULTS)
def test_a_folder_with_other_files_is_refused(model: Path, name: str) -> None:
    change, parts = FAULTS[name]
    change(model)
    with pytest.raises(InputError) as refused:
        find_model(Model(model=str(model)))
    line = str(refused.value)
    assert all(part in line for part in [str(model), *parts]) and "\n" not in line, line


SOUND: dict[str, Change] = {
    "files by their older names": use_older_files,
    "no generation config": remove("generation_config.json"),
    "an index of one part": all_of(rename(WEIGHTS, PART), write_index(PART)),
    "an index beside its only file": write_index(WEIGHTS),
    "weights in a folder below, which nothing reads": lambda folder: shutil.copytree(DEMO, folder / "checkpoint-1"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_folder_with_other_sound_files_is_taken(model: Path, name: str) -> None:
    SOUND[name](model)
    assert find_model(Model(model=str(model))).processor_output is not None


@pytest.mark.parametrize("code", [{}, dict(auto_map={"AutoModel": "modeling.X"})], ids=["no code", "own code"])
def test_the_original_internvl_is_told_its_twin(model: Path, code: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student or teacher is refused whether or not its code is trusted."""
    change_config(model_type="internvl_chat", architectures=["InternVLChatModel"], **code)(model)
    for trusted in ("", str(model)):
        monkeypatch.setenv("MASTERS_TRUST_REMOTE_CODE", trusted)
        with pytest.raises(InputError, match="whose name ends in -hf: such as OpenGVLab/InternVL3-1B-hf"):
            find_model(Model(model=str(model)), must_be_supported=True)
    for name, twin in (("InternVL3-2B", "InternVL3-2B-hf"), ("InternVL3_5-4B", "InternVL3_5-4B-HF")):
        folder = shutil.copytree(model, model.parent / name)
        with pytest.raises(InputError, match=f": OpenGVLab/{twin}$"):
            find_model(Model(model=str(folder)), must_be_supported=True)


def test_a_judge_of_the_original_internvl_needs_trust(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(model_type="internvl_chat", auto_map={"AutoModel": "modeling.X"})(model)
    with pytest.raises(InputError, match="whose name ends in -hf"):
        find_model(Model(model=str(model)))
    monkeypatch.setenv("MASTERS_TRUST_REMOTE_CODE", str(model))
    assert find_model(Model(model=str(model))).has_custom_code


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3", "llava"])
def test_another_family_is_refused_before_its_code_is_asked_for(model: Path, model_type: str) -> None:
    change_config(model_type=model_type, auto_map={"AutoConfig": "x.X"})(model)
    with pytest.raises(InputError, match=f"model type '{model_type}' is not supported; expected one of"):
        find_model(Model(model=str(model)), must_be_supported=True)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors"])
@pytest.mark.parametrize("place", ["", "text_config", "vision_config"])
def test_a_quantized_student_or_teacher_is_refused(model: Path, method: str, place: str) -> None:
    config = json.loads((model / CONFIG).read_text())
    (config[place] if place else config)["quantization_config"] = dict(quant_method=method, bits=4)
    write(CONFIG, json.dumps(config))(model)
    with pytest.raises(InputError, match=f"its weights are quantized .'{method}'.*take the model that it was made"):
        find_model(Model(model=str(model)), must_be_supported=True)


def test_a_quantized_judge_of_a_supported_family_is_left_to_its_engine(model: Path) -> None:
    change_config(quantization_config=dict(quant_method="fp8"))(model)
    tensors = load_file(model / "model.safetensors")
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    save_file(tensors, model / "model.safetensors")
    assert find_model(Model(model=str(model))).processor_output is None


def test_a_revision_of_a_folder_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="revision applies to hub models only"):
        find_model(Model(model=str(model), revision="main"))
