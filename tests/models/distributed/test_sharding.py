"""Two processes with sharded weights (on gloo) train like one process with all weights, for each strategy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from masters.config import Runtime
from masters.execution.processes import LOOPBACK
from masters.models.training import checkpoint as resume
from masters.models.training.memory_estimate import PassSize, estimate_memory
from masters.store.storage import Storage
from tests.models import sharded_training
from tests.models.paper import paper_train
from tests.models.sharded_training import CASES, Tensors, Trained

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharded")
    sharded_training.prepare(made)
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> Trained:
    return Trained(folder, "replicate", 0, 1)


@pytest.fixture(scope="module")
def whole(folder: Path, one: Trained) -> dict:
    """Results of one process with all weights."""
    gradients = {case: one.gradients(case) for case in CASES}
    runs = {case: one.run(case, "one") for case in ("tied", "untied")}
    return dict(gradients=gradients, runs=runs, remasked=one.remasked())


@pytest.fixture(scope="module", params=["fsdp2"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def ranks(folder: Path, way: str, whole: dict) -> list[dict]:
    """Results of each of two ranks, and then of a single sharded rank."""
    environment, stores = os.environ | LOOPBACK | {"OMP_NUM_THREADS": "1"}, folder / way
    shutil.copytree(folder / "one", stores / "from-one")
    for kept in (stores / "from-one").rglob("reference-*"):
        kept.unlink()  # so that passes come between the weights of the start and those of the checkpoint
    shutil.copytree(folder / "teacher", stores / "teacher")

    def start(rank: int, world: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.models.sharded_training", str(stores), way, str(rank), str(world)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    places = [(0, 2), (1, 2), (0, 1)]
    running = [start(*place) for place in places]
    try:
        for process in running:
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
    return [torch.load(stores / f"found-{world}-{rank}.pt", weights_only=False) for rank, world in places]


@pytest.fixture(scope="module")
def two(ranks: list[dict]) -> dict:
    return ranks[0]


def relative_distance(found: Tensors, expected: Tensors, start: Tensors | None = None) -> float:
    """Return the distance of two sets of tensors, relative to the distance of the expected ones from the start (0)."""
    assert found.keys() == expected.keys()
    far = sum(float((expected[n] - (start[n] if start else 0)).square().sum()) for n in expected)
    return (sum(float((found[n] - expected[n]).square().sum()) for n in expected) / far) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_each_step_equal_one_process(case: str, whole: dict, two: dict) -> None:
    for found, expected in zip(two["gradients"][case], whole["gradients"][case], strict=True):
        assert found["sums"] == pytest.approx(expected["sums"], rel=1e-5, abs=1e-6)
        assert relative_distance(found["gradients"], expected["gradients"]) < 1e-5


def test_ranks_took_different_numbers_of_passes(ranks: list[dict]) -> None:
    first, second = ([step["passes"] for step in rank["gradients"]["tied"]] for rank in ranks[:2])
    assert any(a > b for a, b in zip(first, second, strict=True))
    assert any(a == 0 or b == 0 for a, b in zip(first, second, strict=True))
    assert max(first) > 1


def test_a_single_sharded_rank_trains_like_an_unsharded_process(ranks: list[dict], whole: dict) -> None:
    for found, expected in zip(ranks[2]["gradients"]["tied"], whole["gradients"]["tied"], strict=True):
        assert relative_distance(found["gradients"], expected["gradients"]) < 1e-6


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_runs_end_at_the_same_weights(case: str, whole: dict, two: dict) -> None:
    found, expected = two["runs"][case], whole["runs"][case]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert found["events"] == expected["events"]
    assert ("lm_head.weight" in found["after"]) == (case == "untied")
    assert relative_distance(found["after"], expected["after"], expected["before"]) < 0.01


def test_two_ranks_resume_from_a_checkpoint_of_one_and_one_from_that_of_two(
    folder: Path, way: str, one: Trained, whole: dict, two: dict
) -> None:
    shutil.copytree(folder / way / "two", folder / f"from-{way}", dirs_exist_ok=True)
    back = one.run("tied", f"from-{way}")
    for resumed, undisturbed in ((two["resumed"], whole["runs"]["tied"]), (back, two["runs"]["tied"])):
        assert (
            resumed["events"][0] == "resumed"
            and len(resumed["losses"]) == len(sharded_training.STEPS) - sharded_training.CUT
        )
        assert resumed["losses"] == pytest.approx(undisturbed["losses"][sharded_training.CUT :], rel=1e-5)
        assert relative_distance(resumed["after"], undisturbed["after"], undisturbed["before"]) < 0.01


def test_checkpoints_of_one_and_two_ranks_have_the_same_tensors(folder: Path, way: str, whole: dict, two: dict) -> None:
    """Every tensor is full and has the same name, shape and type."""
    states = []
    for store in ("one", f"{way}/two"):
        storage = Storage(str(folder / store))
        checkpoint, refused = resume.newest(storage, "tied")
        assert checkpoint and not refused and checkpoint.step == sharded_training.CUT
        states.append(checkpoint.tensors)
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert (tensor.shape, tensor.dtype) == (states[1][name].shape, states[1][name].dtype)


def test_a_teacher_masked_by_shards_equals_one_masked_as_a_whole(whole: dict, two: dict) -> None:
    first, second = whole["remasked"]
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for found, expected in zip(two["remasked"], whole["remasked"], strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_mean_instead_of_a_sum_is_detected_before_training(whole: dict, two: dict) -> None:
    mean, more, right = two["refused"]
    assert "of 1 to 2 expected 3, found [1.5, 1.5]" in mean and "found [6.0, 6.0]" in more and right == ""
    for found, expected in zip(two["unproven"], whole["gradients"]["tied"], strict=True):
        assert relative_distance(found["gradients"], expected["gradients"]) == pytest.approx(0.5, abs=0.01)


def test_activation_checkpointing_keeps_gradients(one: Trained, whole: dict, two: dict) -> None:
    context = one.context("tied")
    sharded_training.checkpoint_activations(context.student)
    for once, again in (
        (two["gradients"]["tied"], two["again"]),
        (whole["gradients"]["tied"], one.gradients("tied", context)),
    ):
        for a, b in zip(once, again, strict=True):
            assert a["gradients"].keys() == b["gradients"].keys()
            assert all(torch.equal(a["gradients"][name], b["gradients"][name]) for name in a["gradients"])


def test_mixed_precision_is_close_and_keeps_float32_gradients(two: dict) -> None:
    for found, expected in zip(two["bfloat16"], two["gradients"]["tied"], strict=True):
        assert {tensor.dtype for tensor in found["gradients"].values()} == {torch.float32}
        assert 1e-4 < relative_distance(found["gradients"], expected["gradients"]) < 0.05
        assert found["sums"]["loss"] == pytest.approx(expected["sums"]["loss"], rel=0.02)


def test_a_ranks_memory_equals_the_estimate(folder: Path, way: str, two: dict) -> None:
    numbers = {
        str(n): torch.zeros(sharded_training.SIDE, sharded_training.SIDE) for n in range(sharded_training.MATRICES)
    }
    (folder / "matrices").mkdir(exist_ok=True)
    save_file(numbers, folder / "matrices" / "model.safetensors")
    runtime = Runtime.model_validate(dict(sharding=way, train_processes=2))
    made = estimate_memory(folder / "matrices", None, paper_train(), PassSize(0, 0), 2, False, runtime=runtime)
    assert two["kept"] == pytest.approx(made.weights + made.gradients, rel=0.02)


def test_guards_work_on_sharded_weights(ranks: list[dict]) -> None:
    for rank in ranks[:2]:
        assert "step 2, mask stage 0 (ratio 0.4), question q6: the loss is nan" in rank["spoilt"]
    fallen = ranks[0]["fallen"]
    assert fallen["events"][-2:] == ["rolled_back", "packed"]
    assert all(torch.equal(fallen["after"][name], fallen["before"][name]) for name in fallen["before"])


def test_all_ranks_restart_if_one_runs_out_of_memory(ranks: list[dict]) -> None:
    for rank in ranks[:2]:
        message, events = rank["memory"]
        assert "all processes restart from the last checkpoint" in message
        assert events[-1].event == "again" and events[-1].tokens < sharded_training.BUDGET
