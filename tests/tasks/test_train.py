"""Training in its own processes: an interrupted run and one of two processes end where a plain one does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from masters import processes
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.stage import Run
from masters.tasks.train import train
from tests.drawn import write_questions
from tests.trained import ROOT, by_hand, first_round, made_run

STEPS = 10


def trained(run: Run) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and the stage's line of the summary."""
    current = first_round(run)
    questions = data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **by_hand(run, current, questions)}
    artifact = train.fn(run, current, inputs)
    return load_file(Path(artifact.uri) / "model/model.safetensors"), run.stages[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 52, bad=False)


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    weights, done = trained(made_run(tmp_path_factory.mktemp("plain"), source))
    assert done["steps"] in (STEPS, STEPS + 1) and done["resumed_at_step"] == 0
    assert len(done["remask_seconds"]) == 2  # mask stages
    return weights


def test_training_moves_every_kind_of_weight(plain: dict[str, torch.Tensor]) -> None:
    before = load_file(ROOT / "demo/models/student/model.safetensors")
    assert plain.keys() == before.keys()
    moved = {name for name in plain if not torch.equal(plain[name], before[name])}
    for part in ("visual", "language_model", "embed_tokens"):
        assert any(part in name for name in moved)


def test_an_interrupted_run_goes_on_and_ends_the_same(source, plain, tmp_path, monkeypatch) -> None:
    run = made_run(tmp_path, source, runtime=dict(checkpoint_steps=2))
    original = processes.run

    def interrupted(children, at_once, on_progress) -> float:
        def stop(name: str, line: dict) -> None:
            if line.get("event") == "step" and line["step"] >= 5:
                raise KeyboardInterrupt
            on_progress(name, dict(line))

        return original(children, at_once, stop)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(run)
    weights, done = trained(made_run(tmp_path, source, runtime=dict(checkpoint_steps=2)))
    assert done["resumed_at_step"] >= 4
    assert {name for name in plain if not torch.equal(plain[name], weights[name])} == set()


def test_two_processes_train_like_one(source, plain, tmp_path) -> None:
    weights, done = trained(made_run(tmp_path, source, runtime=dict(train_processes=2)))
    assert done["processes"] == 2
    for name, expected in plain.items():  # exported in bfloat16: up to one unit in the last place may differ
        torch.testing.assert_close(weights[name].float(), expected.float(), rtol=2**-7, atol=1e-4)
