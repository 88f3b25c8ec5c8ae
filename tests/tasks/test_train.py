"""Training in child processes: interrupted runs and runs with two processes end like an uninterrupted one."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from masters.common import machine
from masters.common.errors import InputError, WorkerLost
from masters.common.hashing import digest
from masters.config.mask_schedule import mask_stage_of
from masters.data.question_shards import QuestionRef
from masters.execution import processes
from masters.models import model_loading
from masters.models.training import worker
from masters.models.training.job import RoundPart
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.run_context import Run
from masters.tasks.train import GUARD_FIELDS, MAX_PROBE, hold_out, make_identity, make_job, train
from masters.tasks.training_monitor import TrainingMonitor
from tests.handmade_run import ROOT, first_round, make_run, write_training_inputs
from tests.models.padded_models import save_padded
from tests.shape_data import write_questions

STEPS = 10


Tables = dict[str, list[dict]]


def run_training(run: Run) -> tuple[dict[str, torch.Tensor], dict, Tables]:
    """Train. Returns the weights, the stage's entry of the summary, and the rows of the tables."""
    current = first_round(run)
    questions = data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **write_training_inputs(run, current, questions)}
    artifact = train.fn(run, current, inputs)
    tables = {name: sorted(artifact.rows(name), key=repr) for name in ("history", "rewards")}
    return load_file(Path(artifact.uri) / "model/model.safetensors"), run.stages[-1], tables


def interrupt_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until a few steps after a checkpoint."""
    original = processes.run

    def interrupt(children, max_running, on_progress, heartbeat_timeout) -> None:
        def stop(name: str, line: dict) -> None:
            if line.get("event") == "step" and line["step"] >= 5:
                raise KeyboardInterrupt
            on_progress(name, dict(line))

        original(children, max_running, stop, heartbeat_timeout)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_training(run)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 52, bad=False)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Tables]:
    weights, done, tables = run_training(make_run(tmp_path_factory.mktemp("plain"), source))
    assert done["steps"] in (STEPS, STEPS + 1) and done["resumed_at_step"] == 0
    assert len(done["remask_seconds"]) == 2  # mask stages
    assert done["planned"]["passes"] == done["packed"]["passes"] == done["steps"] and done["token_budgets"] == []
    assert done["planned"]["largest_pass"] > 0 and 0 < done["packed"]["saved_share"] < 1
    assert 0 <= done["packed"]["padding_share"] < 1
    return weights, tables


@pytest.fixture(scope="module")
def plain(whole) -> dict[str, torch.Tensor]:
    return whole[0]


@pytest.fixture(scope="module")
def recorded(whole) -> Tables:
    return whole[1]


def responses(tables: Tables) -> set[tuple]:
    return {(r["stage"], r["question_id"], r["source"], r["mask_ratio"], r["sample"]) for r in tables["rewards"]}


def test_steps_and_responses_are_recorded_once(recorded: Tables) -> None:
    steps, rows = recorded["history"], recorded["rewards"]
    assert sorted(row["step"] for row in steps) == list(range(1, len(steps) + 1))
    assert {row["mask_ratio"] for row in steps} == {0.2, 0.0}
    assert sum(row["probe_accuracy"] is not None for row in steps) >= STEPS
    assert len(rows) == len(responses(recorded)) == 2 * 39  # a teacher's and a student's response a training question
    for row in rows:
        assert row["mask_ratio"] == (row["teacher_ratio"] if row["source"] == "teacher" else None)
        assert row["reward_accuracy"] == float(row["source"] == "teacher")
        assert row["reward"] == pytest.approx(row["reward_accuracy"] * (1 + row["reward_distillation"]))
    for step in steps:
        of_step = [row for row in rows if row["step"] == step["step"]]
        assert len(of_step) == 2 * step["questions"]
        mean = sum(row["divergence"] for row in of_step) / len(of_step)  # every question has two responses
        assert step["divergence"] == pytest.approx(mean, rel=1e-5)


def test_padding_and_generation_settings_of_the_models_change_nothing(
    plain: dict[str, torch.Tensor], recorded: Tables, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows of the embedding beyond the tokenizer take no part; settings of the first student are not passed on."""
    student, teacher = (
        save_padded(ROOT / "demo/models" / name, tmp_path / name, rows)
        for name, rows in (("student", 8), ("teacher", 20))
    )
    settings = student / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | dict(max_new_tokens=1, top_k=1)))
    teachers = [dict(model=str(teacher), r_max=0.2, mask_step=0.2)]
    run = make_run(tmp_path / "store", source, teachers, student=dict(model=str(student)))
    weights, _, tables = run_training(run)
    assert repr(tables) == repr(recorded)
    assert all(torch.equal(weights[name][: len(expected)], expected) for name, expected in plain.items())
    artifact = run.artifacts["train"]
    assert artifact.facts["dropped_generation_settings"] == ["max_new_tokens", "top_k"]
    assert "max_new_tokens, top_k of the student's generation_config.json" in " ".join(capfd.readouterr().err.split())
    exported = json.loads((Path(artifact.uri) / "model/generation_config.json").read_text())
    assert not exported.keys() & {"max_new_tokens", "top_k"} and exported["eos_token_id"] == 2


def test_only_padded_models_change_the_identity(source: Path, tmp_path: Path) -> None:
    """Trained before padding was left out, their students are others; those of all other models are not."""
    plain = make_run(tmp_path / "plain", source)
    assert "vocabulary" not in make_identity(plain, first_round(plain), {}).config
    teacher = save_padded(ROOT / "demo/models/teacher", tmp_path / "teacher", 20)
    padded = make_run(tmp_path / "padded", source, [dict(model=str(teacher), r_max=0.2, mask_step=0.2)])
    assert make_identity(padded, first_round(padded), {}).config["vocabulary"] == "tokenizer"


def test_training_moves_every_kind_of_weight(plain: dict[str, torch.Tensor]) -> None:
    before = load_file(ROOT / "demo/models/student/model.safetensors")
    assert plain.keys() == before.keys()
    moved = {name for name in plain if not torch.equal(plain[name], before[name])}
    for part in ("visual", "language_model", "embed_tokens"):
        assert any(part in name for name in moved)


def test_an_interrupted_run_resumes_and_ends_with_the_same_result(
    source, plain, recorded, tmp_path, monkeypatch
) -> None:
    interrupt_training(make_run(tmp_path, source, runtime=dict(checkpoint_steps=2)), monkeypatch)
    weights, done, tables = run_training(make_run(tmp_path, source, runtime=dict(checkpoint_steps=2)))
    assert done["resumed_at_step"] >= 4
    assert {name for name in plain if not torch.equal(plain[name], weights[name])} == set()
    assert tables == recorded


def test_two_processes_train_like_one(source, plain, recorded, tmp_path, monkeypatch) -> None:
    """Also if they are interrupted and resumed."""
    interrupt_training(make_run(tmp_path, source, runtime=dict(train_processes=2, checkpoint_steps=3)), monkeypatch)
    weights, done, tables = run_training(
        make_run(tmp_path, source, runtime=dict(train_processes=2, checkpoint_steps=3))
    )
    assert done["processes"] == 2 and done["resumed_at_step"] >= 3
    [progress] = tmp_path.glob(".work/train-*/rank-1.progress")  # without heartbeats a rank is taken for lost
    assert progress.read_text().count('"alive"') > done["steps"] - done["resumed_at_step"]
    assert len(tables["rewards"]) == len(responses(tables)) and responses(tables) == responses(recorded)
    assert sorted(row["step"] for row in tables["history"]) == sorted(row["step"] for row in recorded["history"])
    for name, expected in plain.items():  # exported in bfloat16: up to one unit in the last place may differ
        torch.testing.assert_close(weights[name].float(), expected.float(), rtol=2**-7, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp2"])
def test_a_killed_rank_with_sharded_weights_is_named_and_the_run_resumes(
    sharding, source, plain, recorded, tmp_path, monkeypatch
) -> None:
    shared = dict(train_processes=2, sharding=sharding, activation_checkpointing=True, checkpoint_steps=2)
    ranks, start, handle = {}, processes._start, TrainingMonitor.__call__

    def started(child: processes.Child, slot: int | None) -> subprocess.Popen:
        ranks[child.name] = start(child, slot)
        return ranks[child.name]

    def kill_rank(monitor: object, name: str, line: dict) -> None:
        if line["event"] == "step" and line["step"] == 5:
            ranks["rank-1"].kill()
        handle(monitor, name, line)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "_start", started)
        patch.setattr(TrainingMonitor, "__call__", kill_rank)
        with pytest.raises(WorkerLost, match="rank-1 ended with signal SIGKILL"):
            run_training(make_run(tmp_path, source, runtime=shared))
    assert all(rank.poll() is not None for rank in ranks.values())
    weights, done, tables = run_training(make_run(tmp_path, source, runtime=shared))
    assert done["resumed_at_step"] >= 4 and done["sharding"] == sharding and done["processes"] == 2
    assert 0.45 < done["weights_share"] < 0.55
    assert responses(tables) == responses(recorded) and len(tables["rewards"]) == len(responses(tables))
    for name, expected in plain.items():
        torch.testing.assert_close(weights[name].float(), expected.float(), rtol=2**-7, atol=1e-4)


@pytest.mark.slow
def test_a_drop_on_held_out_questions_ends_with_the_best_weights(source: Path, tmp_path: Path) -> None:
    wild = dict(learning_rate=0.1, max_validation_drop=0.1, on_drop="rollback")
    run = make_run(tmp_path, source, train=wild)
    weights, _, tables = run_training(run)
    facts = run.artifacts["train"].facts
    assert facts["held_out"] == 3 and facts["rows"] == 36  # one in ten of 39
    assert facts["rolled_back"]["to"] == 0 < facts["rolled_back"]["at"] == len(tables["history"])
    assert facts["rolled_back"]["accuracy"] < facts["rolled_back"]["best"] == facts["probes"][0]["accuracy"]
    before = load_file(ROOT / "demo/models/student/model.safetensors")
    assert {name for name in before if not torch.equal(before[name], weights[name])} == set()


def test_held_out_questions_come_from_all_mask_stages() -> None:
    refs = sorted(QuestionRef(digest(str(n).encode()), f"q{n}", 0, n) for n in range(3000))
    train_refs, probe = hold_out(refs)
    assert sorted([*train_refs, *probe]) == refs and len(probe) == MAX_PROBE
    assert all(sum(mask_stage_of(ref.digest, 5) == stage for ref in probe) > MAX_PROBE / 10 for stage in range(5))
    assert len(hold_out(refs[:55])[1]) == 5
    with pytest.raises(InputError, match="expected 10 or more, found 9"):
        hold_out(refs[:9])


def test_a_disabled_guard_is_not_part_of_the_identity(source: Path, tmp_path: Path) -> None:
    def config(**train: object) -> dict:
        run = make_run(tmp_path, source, train=train)
        return make_identity(run, first_round(run), {}).config["train"]

    assert config().keys() & GUARD_FIELDS == set() and config(on_drop="rollback") == config()
    assert config(max_validation_drop=0.1) == config() | dict(max_validation_drop=0.1, on_drop="stop")


def test_the_compute_dtype_is_part_of_the_identity_unless_it_is_the_default(source: Path, tmp_path: Path) -> None:
    def config(**train: object) -> dict:
        run = make_run(tmp_path, source, train=train)
        return make_identity(run, first_round(run), {}).config["train"]

    assert config() == config(compute_dtype="float32") and "compute_dtype" not in config()
    assert config(compute_dtype="bfloat16") == config() | dict(compute_dtype="bfloat16")


def test_what_is_done_with_truncated_responses_is_part_of_the_identity_unless_they_are_kept(
    source: Path, tmp_path: Path
) -> None:
    def config(truncated: str, **train: object) -> dict:
        run = make_run(tmp_path, source, generate=dict(truncated=truncated), train=train)
        return make_identity(run, first_round(run), {}).config

    kept, labels = config("keep"), dict(objective="kd", targets="labels")
    assert "truncated" not in kept | kept["train"]
    assert [config(value) for value in ("mask", "drop")] == [kept | dict(truncated=value) for value in ("mask", "drop")]
    assert config("mask", **labels) == config("keep", **labels)  # labels are never cut off


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truncated", "questions", "learns"), [("mask", 9, False), ("drop", 0, False), ("keep", 9, True)]
)
def test_a_student_learns_from_truncated_responses_only_if_they_are_kept(
    truncated: str, questions: int, learns: bool, tmp_path: Path
) -> None:
    run = make_run(tmp_path, write_questions(tmp_path, 12, bad=False), generate=dict(truncated=truncated))
    current, table = first_round(run), data.fn(run)
    inputs = write_training_inputs(run, current, table, finish_reason="length")
    artifact = train.fn(run, current, {"data": table, "masks": mask.fn(run, current)} | inputs)
    weights, before = (
        load_file(Path(folder) / "model.safetensors")
        for folder in (f"{artifact.uri}/model", ROOT / "demo/models/student")
    )
    assert any(not torch.equal(weights[name], before[name]) for name in before) == learns
    assert artifact.facts["rows"] == questions and len(list(artifact.rows("rewards"))) == 2 * questions
    if truncated == "mask":
        assert {row["loss"] for row in artifact.rows("history")} == {0.0}
        assert artifact.facts["signal"] == run.stages[-1]["signal"] == {"no_advantage": 1.0}


def test_too_little_memory_is_refused_before_a_model_is_loaded(source, tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path, source)
    current, questions = first_round(run), data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **write_training_inputs(run, current, questions)}
    job = make_job(run, current, inputs, RoundPart(), "checkpoints", tmp_path / "out")
    monkeypatch.setattr(model_loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(machine, "available_memory", lambda: 8 << 20)
    with pytest.raises(InputError, match=r"0.01 GiB are free \(weights .* pass: \d{2,} tokens\): take a smaller"):
        worker.prepare(job, tmp_path / "job.json", 0, 1)


def test_a_warning_is_reported_once_and_recorded(capsys: pytest.CaptureFixture) -> None:
    tags: dict[str, str] = {}
    monitor = TrainingMonitor(SimpleNamespace(tracker=SimpleNamespace(log_warning=tags.__setitem__)), None, [0.2])  # pyright: ignore
    for step in (3, 6):  # the second one from a resumed trainer
        monitor("rank-0", dict(event="warning", step=step, name="entropy", text="the entropy fell"))
    assert monitor.warnings == [dict(step=3, name="entropy", text="the entropy fell")]
    assert tags == {"entropy": "step 3: the entropy fell"}
    assert capsys.readouterr().err.count("train, step 3: the entropy fell") == 1


def test_repeated_probe_measurements_are_recorded_once() -> None:
    monitor = TrainingMonitor(SimpleNamespace(tracker=SimpleNamespace(log_metrics=lambda *_: None)), None, [0.2])  # pyright: ignore
    for step in (0, 2, 4):
        monitor("rank-0", dict(event="probe", step=step, accuracy=0.5))
    monitor("rank-0", dict(event="resumed", step=2, total=9))
    monitor("rank-0", dict(event="probe", step=4, accuracy=0.5))
    assert [probe["step"] for probe in monitor.probes] == [0, 2, 4]
