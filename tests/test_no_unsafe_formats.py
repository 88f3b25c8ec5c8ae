"""Files are data alone: safetensors, Parquet and JSON. No file of ours can run code when it is opened."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.flows import Flow
from prefect.tasks import Task

from masters.flows import distill, evaluate, nightly, study
from masters.models import model_loading
from masters.tasks import data, generate, mask, register, report, score, train
from masters.tasks import evaluate as evaluation

ROOT = Path(__file__).parents[1]
FOLDERS = ("flows", "tasks", "models", "rewards", "infra", "demo", "benchmarks", "examples", "src/masters")
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {
    "torch.load",
    "torch.save",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "yaml.load",
    "eval",
    "exec",
    "os.system",
}


def faults(source: str) -> Iterator[str]:
    """Find calls in a module that open files that may run code, run text as code, or trust a model's own code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in CALLS and not (called == "torch.load" and given.get("weights_only") == "True"):
                yield called
            if given.get("shell", "False") != "False":
                yield f"{called}: a shell"
            if given.get("trust_remote_code", "False") not in ("False", "trust_remote_code", "model.has_custom_code"):
                yield f"{called}: trusts code"
            loads = called.startswith("Auto") and called.endswith(".from_pretrained")
            if loads and "trust_remote_code" not in given:
                yield f"{called}: leaves it to transformers, which asks on the terminal"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import load", "torch.load(f)", "torch.load(f, weights_only=False)",
        "torch.save(x, f)",
        "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(f)", "exec(text)", "np.load(f)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)", "LLM(f, trust_remote_code=config.trust)",
    ],
)  # fmt: skip
def test_unsafe_code_is_found(line: str) -> None:
    assert list(faults(line))


def test_no_module_has_unsafe_code() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)): list(faults(file.read_text())) for file in files}
    for name, of in found.items():
        if name.startswith(("benchmarks/", "demo/", "examples/")):  # they load the repository's own models alone
            found[name] = [fault for fault in of if "leaves it" not in fault]
    assert len(files) > 100 and {name: of for name, of in found.items() if of} == {}


def test_weights_are_read_as_safetensors_alone() -> None:
    """Transformers, where a folder holds other formats too, and vLLM read safetensors alone."""
    assert "use_safetensors=True" in (ROOT / "models/model_loading.py").read_text()
    assert 'load_format="safetensors"' in (ROOT / "models/generation/engine.py").read_text()
    assert {"*.bin", "*.pt", "*.pth", "*.pkl"} <= set(model_loading.UNSAFE_FILES)


def test_prefect_keeps_no_result() -> None:
    """Its default for results that are kept is a pickle, which whoever reads it would run."""
    modules = (distill, evaluate, nightly, study, data, evaluation, generate, mask, register, report, score, train)
    runs = [of for module in modules for of in vars(module).values() if isinstance(of, Flow | Task)]
    assert {of.name for of in runs} >= {"distill", "nightly", "evaluate", "study", "data", "train", "score", "report"}
    assert [of.name for of in runs if of.persist_result is not False] == []
