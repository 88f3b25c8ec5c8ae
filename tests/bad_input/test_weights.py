"""Broken model folders: preflight refuses them before an engine starts, with one line that names the fault."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo import families
from masters.checks import model_folder
from masters.checks import weights as soundness
from masters.common.errors import InputError
from masters.common.hashing import model_digest
from masters.config import Model
from masters.config.loading import load, override_values

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo/models/student"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
GATE = "model.language_model.layers.0.mlp.gate_proj.weight"
NORM = "model.visual.blocks.0.norm1.weight"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache of checked weights."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Return a function that changes the tensors of a folder by name."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def set_element(name: str, value: float) -> Callable[[Path], object]:
    """Return a function that sets the last element of a tensor."""
    return change_tensors(lambda tensors: tensors[name].view(-1)[-1].fill_(value))


def change_text_config(**changes: object) -> Callable[[Path], object]:
    """Return a function that changes the text model in config.json."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        found["text_config"] |= changes
        (folder / CONFIG).write_text(json.dumps(found))

    return apply


def change_json(name: str, *keys: str, **changes: object) -> Callable[[Path], object]:
    """Return a function that changes a JSON file below these keys."""

    def apply(folder: Path) -> None:
        inner = found = json.loads((folder / name).read_text())
        for key in keys:
            inner = inner[key]
        inner |= changes
        (folder / name).write_text(json.dumps(found))

    return apply


def truncate(name: str, keep: Callable[[int], int]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: keep(len(data))])

    return apply


def write_text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


PROCESSOR, TEMPLATE, GENERATION = "processor_config.json", "chat_template.jinja", "generation_config.json"
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "NaN in a matrix": (set_element(GATE, float("nan")), [WEIGHTS, GATE, "NaN"]),
    "NaN in a norm, which is never masked": (set_element(NORM, float("nan")), [WEIGHTS, NORM, "NaN"]),
    "infinity": (set_element(GATE, float("inf")), [WEIGHTS, GATE, "infinity"]),
    "negative infinity": (set_element(NORM, float("-inf")), [WEIGHTS, NORM, "infinity"]),
    "another shape": (
        change_tensors(lambda tensors: tensors.update({GATE: torch.zeros(3, 64)})),
        [GATE, "shape [192, 64]", "hold [3, 64]"],
    ),
    "transposed": (
        change_tensors(lambda tensors: tensors.update({GATE: tensors[GATE].T.contiguous()})), [GATE, "hold [64, 192]"],
    ),
    "one dimension": (
        change_tensors(lambda tensors: tensors.update({GATE: torch.zeros(12_288)})), [GATE, "hold [12288]"],
    ),
    "no architecture": (change_json(CONFIG, architectures=None), ['"architectures": ["Qwen3VL', "found none"]),
    "another architecture": (change_json(CONFIG, architectures=["LlamaForCausalLM"]), ["found ['LlamaForCausalLM']"]),
    "a tensor of another model": (
        change_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))), ["hold 1 tensors", "first: extra"],
    ),
    "a matrix of integers": (
        change_tensors(lambda tensors: tensors.update({GATE: tensors[GATE].to(torch.int8)})), [GATE, "of type I8"],
    ),
    "fewer layers than its weights": (change_text_config(num_hidden_layers=2), ["hold 11 tensors", "layers.2"]),
    "a tensor missing": (change_tensors(lambda tensors: tensors.pop(GATE)), ["lack 1 tensors", GATE]),
    "no tensor at all": (lambda folder: save_file({}, folder / WEIGHTS), ["describes no model", "0 tensors"]),
    "truncated": (truncate(WEIGHTS, lambda size: size // 2), [WEIGHTS, "cannot be read"]),
    "a byte short": (truncate(WEIGHTS, lambda size: size - 1), [WEIGHTS, "cannot be read"]),
    "header cut": (truncate(WEIGHTS, lambda size: 20), [WEIGHTS, "cannot be read"]),
    "empty weights": (truncate(WEIGHTS, lambda size: 0), [WEIGHTS, "cannot be read"]),
    "text named safetensors": (write_text(WEIGHTS, "not weights"), [WEIGHTS, "cannot be read"]),
    "a pickle named safetensors": (lambda folder: torch.save({}, folder / WEIGHTS), [WEIGHTS, "cannot be read"]),
    "wider than its weights": (change_text_config(hidden_size=128), ["asks for", "shape"]),
    "more layers than its weights": (change_text_config(num_hidden_layers=5), ["lack", "layers.3"]),
    "layers without end": (change_text_config(num_hidden_layers=10**9), ["describes no model", "1000000000 layers"]),
    "negative size": (change_text_config(hidden_size=-64), ["describes no model"]),
    "size as text": (change_text_config(hidden_size="many"), ["describes no model"]),
    "config is no json": (write_text(CONFIG, "{"), ["names no model_type"]),
    "config is a list": (write_text(CONFIG, "[1]"), ["names no model_type"]),
    "config without end": (write_text(CONFIG, "[" * 100_000), ["names no model_type"]),
    "processor cut": (truncate(PROCESSOR, lambda size: size // 2), ["its processor cannot be loaded"]),
    "processor is a list": (write_text(PROCESSOR, "[]"), ["its processor cannot be loaded"]),
    "patches of another size": (change_json(PROCESSOR, "image_processor", patch_size=16), ["4 tokens", "describes 16"]),
    "merges of another size": (change_json(PROCESSOR, "image_processor", merge_size=1), ["64 tokens", "describes 16"]),
    "broken chat template": (write_text(TEMPLATE, "{% for m in messages %}"), ["its chat template cannot be used"]),
    "template that reaches out": (
        write_text(TEMPLATE, "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        ["its chat template cannot be used"],
    ),
    "template without image": (
        write_text(TEMPLATE, "{% for c in messages[0]['content'] %}{{ c['text'] }}{% endfor %}"),
        ["its chat template puts the image 0 times"],
    ),
    "template with two images": (write_text(TEMPLATE, PICTURE * 2 + "what shape is it?"), ["make no prompt"]),
    "template without question": (write_text(TEMPLATE, PICTURE), ["writes the question 0 times"]),
    "template with two questions": (
        write_text(TEMPLATE, PICTURE + "{{ messages[0]['content'][1]['text'] }}" * 2), ["writes the question 2 times"],
    ),
    "another image token": (change_json(CONFIG, image_token_id=6), ["image_token_id is 6, its processor's 5"]),
    "broken generation config": (write_text(GENERATION, "{"), ["generation_config.json cannot be read"]),
    "generation config is a list": (write_text(GENERATION, "[]"), ["generation_config.json cannot be read"]),
    "end that is no token": (change_json(GENERATION, eos_token_id=10**6), [GENERATION, "1000000", "below 362"]),
    "end that is text": (change_json(GENERATION, eos_token_id="<|im_end|>"), [GENERATION]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_faulty_model_folder_is_refused(model: Path, home: Path, name: str) -> None:
    change, message = FOLDERS[name]
    change(model)
    with pytest.raises(InputError) as refused:
        model_folder.find_model(Model(model=str(model)))
    line = str(refused.value)
    assert all(part in line for part in message) and "\n" not in line, line
    assert not (home / ".cache/masters/sound").exists()  # a broken model is checked again


def test_model_with_too_few_positions_is_refused(model: Path) -> None:
    """The model is valid, but too short for prompt and answer of the configuration."""
    change_text_config(max_position_embeddings=64)(model)
    short_model = model_folder.find_model(Model(model=str(model)))
    settings = load(ROOT / "configs/easyvqa.toml")
    assert short_model.processor_output is not None and short_model.processor_output.positions == 64
    longest = override_values(settings, {"generate.max_tokens": 64 - short_model.processor_output.prompt})
    model_folder.check_context_length(short_model, longest)
    with pytest.raises(InputError, match=r"generate.max_tokens 64, .* max_position_embeddings \(64\): raise"):
        model_folder.check_context_length(short_model, override_values(settings, {"generate.max_tokens": 64}))


def test_checked_weights_are_cached(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_folder.find_model(Model(model=str(model)))
    monkeypatch.setattr(soundness, "run_processor", None)
    assert model_folder.find_model(Model(model=str(model))) == first
    (note,) = (Path.home() / ".cache/masters/sound").iterdir()
    note.write_text("{")  # a damaged note is ignored
    monkeypatch.undo()
    assert model_folder.find_model(Model(model=str(model))) == first


@pytest.mark.parametrize("name", families.NAMES)
def test_every_family_is_checked(name: str, tmp_path: Path) -> None:
    folder = families.save(name, tmp_path / "model", ["what shape is it?"])
    found = model_folder.find_model(Model(model=str(folder))).processor_output
    assert found is not None and found.positions == 512 and found.prompt > 10


def test_weights_are_checked_once_and_again_after_a_change(model: Path, monkeypatch) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(soundness, "check_finite", checked.append)
    for _ in range(2):
        model_folder.find_model(Model(model=str(model)))
    assert checked == [model]
    set_element(GATE, 0.5)(model)
    model_folder.find_model(Model(model=str(model)))
    assert checked == [model, model]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_dtype_is_checked(tmp_path: Path, dtype: torch.dtype) -> None:
    good = torch.linspace(-2, 2, 1000).to(dtype)
    save_file({"good": good, "ids": torch.arange(3), "none": torch.zeros(0)}, tmp_path / "a.safetensors")
    soundness.check_finite(tmp_path)
    bad = good.to(torch.float32)
    bad[500] = float("nan")
    save_file({"bad": bad.to(dtype)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="b.safetensors: tensor bad holds NaN"):
        soundness.check_finite(tmp_path)


def test_custom_model_code_is_not_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an environment variable can allow it; there is no question on the terminal, as transformers would ask."""
    marker = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    found = json.loads((model / CONFIG).read_text()) | dict(model_type="evil", auto_map={"AutoConfig": "evil.C"})
    (model / CONFIG).write_text(json.dumps(found))
    with pytest.raises(InputError, match="code of its own, which is off.*MASTERS_TRUST_REMOTE_CODE"):
        model_folder.find_model(Model(model=str(model)))
    monkeypatch.setenv("MASTERS_TRUST_REMOTE_CODE", f"/elsewhere,{model}")
    assert model_folder.find_model(Model(model=str(model))).has_custom_code
    assert not marker.exists()


def test_supported_families_use_code_of_transformers(model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass C: pass\n")
    found = json.loads((model / CONFIG).read_text()) | dict(
        auto_map={"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.C"}
    )
    (model / CONFIG).write_text(json.dumps(found))
    found = model_folder.find_model(Model(model=str(model)))
    assert not found.has_custom_code and not marker.exists()


def test_model_code_is_part_of_its_digest(model: Path) -> None:
    before = model_digest(model)
    (model / "modeling.py").write_text("x = 1")
    assert model_digest(model) != before


def cast_gate(dtype: torch.dtype) -> Callable[[Path], object]:
    return change_tensors(lambda tensors: tensors.update({GATE: tensors[GATE].to(dtype)}))


UNMASKABLE: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "nothing is left to mask": (lambda folder: None, (".*",), "no tensor is left to mask"),
    "8-bit weights": (cast_gate(torch.float8_e4m3fn), (), f"{GATE} is of type F8"),
    "64-bit weights": (cast_gate(torch.float64), (), f"{GATE} is of type F64"),
    "several types": (cast_gate(torch.float32), (), "of several types (BF16, F32)"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNMASKABLE)
def test_teacher_without_maskable_weights_is_refused(model: Path, name: str) -> None:
    change, exclude, message = UNMASKABLE[name]
    change(model)
    with pytest.raises(InputError) as refused:
        soundness.check_maskable(model, exclude)
    assert message in str(refused.value)
    soundness.check_maskable(DEMO, ())
