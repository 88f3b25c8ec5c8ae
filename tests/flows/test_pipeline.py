"""The whole pipeline as a user runs it: real Prefect, vLLM, torch and MLflow on a small JSONL of drawn shapes."""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from masters.config.loading import load
from masters.config.stages import Stage
from masters.flows.plan import plan
from tests.command_line import ROOT, masters, options, read_json, rows
from tests.process_table import command_line, processes_with_variable
from tests.shape_data import write_questions, write_rows

STAGES = ["data", "mask", "generate", "score", "train", "evaluate", "register"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    lines = [json.loads(line) for line in write_questions(folder / "data", 64).read_text().splitlines()]
    for row in lines[:2]:  # a question to evaluate on, and one to learn from
        row["answer"] = [row["answer"], "another word"]
    write_rows(folder / "data", lines)
    (folder / "home").mkdir()
    return folder


def settings(place: Path) -> list[str]:
    values = {
        "preset": "paper",  # with every term of the loss
        "data.source": place / "data" / "questions.jsonl",
        "data.max_rejected_share": 0.2,
        "store.root": place / "store",
        "train.epochs": 1,
        "runtime.checkpoint_steps": 3,
        "train.questions_per_step": 4,
    }
    return options(values)


@pytest.fixture(scope="module")
def first(place: Path) -> dict:
    done = masters("distill", "configs/easyvqa.toml", *settings(place), "--json", home=place / "home")
    assert "report is incomplete" not in done.stderr and "Error logging" not in done.stderr, done.stderr[-3000:]
    return read_json(done)


def test_the_summary_lists_every_stage_as_built(first: dict, place: Path) -> None:
    assert [(s["name"], s["outcome"]) for s in first["stages"]] == [(name, "built") for name in STAGES]
    assert first["status"] == "completed"
    assert json.loads((place / "store" / "summary.json").read_text()) == first
    assert first["prefect"]["flow_run_id"]
    assert first["mlflow"]["model_version"] == 1


def test_each_model_starts_one_engine(first: dict) -> None:
    """Teacher and student answer both splits with one engine each; the trained student is a third model."""
    stages = {stage["name"]: stage for stage in first["stages"]}
    assert [stages[name]["engines"] for name in ("generate", "evaluate")] == [2, 1]
    assert (stages["evaluate"]["shards"], stages["evaluate"]["shards_built"]) == (3, 1)


def test_the_summary_contains_the_memory_of_each_stage(first: dict) -> None:
    """Engines and trainers import PyTorch, which takes at least 200 MiB per process."""
    stages = {stage["name"]: stage for stage in first["stages"]}
    assert all(100 < stage["peak_mib"] < 24_000 for stage in first["stages"])
    assert all(2 * 200 < stages[name]["children_peak_mib"] < 24_000 for name in ("generate", "train"))


def test_bad_rows_are_rejected_with_a_reason(first: dict) -> None:
    assert sorted(row["id"] for row in rows(first, "data", "rejected")) == [
        "broken",
        "empty",
        "missing",
        "outside",
        "q1",
    ]
    assert first["stages"][0]["rejected"] == 5
    questions = rows(first, "data", "questions")
    assert len(questions) == 64
    accepted = {row["question_id"]: row["accepted_answers"][1:] for row in questions if row["accepted_answers"][1:]}
    assert accepted == {"q0": ["another word"], "q1": ["another word"]}
    assert all(row["answer"] == row["accepted_answers"][0] for row in questions)


def test_each_expected_response_and_verdict_exists_once(first: dict) -> None:
    key = ("question_id", "source", "mask_ratio", "sample")
    responses, verdicts = (rows(first, s, t) for s, t in (("generate", "responses"), ("score", "verdicts")))
    keys = [tuple(row[k] for k in key) for row in responses]
    assert len(keys) == len(set(keys)) == 48 * 8
    assert {tuple(row[k] for k in key) for row in verdicts} == set(keys)
    assert {row["mask_ratio"] for row in responses if row["source"] == "student"} == {None}
    per_question = {row["question_id"]: row["mask_ratio"] for row in responses if row["source"] == "teacher"}
    assert len(set(per_question.values())) > 1  # several masked teachers answered, one engine
    assert all(row["score"] in (0.0, 1.0) and row["status"] == "ok" for row in verdicts)


def test_scores_follow_from_the_predictions(first: dict) -> None:
    predictions = rows(first, "evaluate", "predictions")
    after = [row["correct"] for row in predictions if row["model"] == "student-after"]
    assert first["student"]["after"]["n"] == len(after) == 16
    assert first["student"]["after"]["accuracy"] == pytest.approx(sum(after) / 16)
    assert first["metric"] == "exact match"
    assert first["teachers"][0]["accuracy"] >= 0.9  # the teacher has seen such shapes


def test_transformers_loads_the_student_and_gives_the_same_answers(first: dict) -> None:
    import io

    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = first["student"]["after"]["uri"]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answers = {
        r["question_id"]: r["text"] for r in rows(first, "evaluate", "predictions") if r["model"] == "student-after"
    }
    agree = 0
    for row in rows(first, "data", "questions"):
        if row["split"] == "test":
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
            text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            inputs = processor(text=[text], images=[Image.open(io.BytesIO(row["image"]))], return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            agree += answer.strip() == answers[row["question_id"]].strip()
    assert agree >= 15  # of 16: two engines may differ on a near tie


def test_running_again_reuses_everything(first: dict, place: Path) -> None:
    done = masters("distill", "configs/easyvqa.toml", *settings(place), "--json", home=place / "home")
    again = read_json(done)
    assert {s["outcome"] for s in again["stages"]} == {"reused"}
    assert again["student"] == first["student"]
    assert [s["fingerprint"] for s in again["stages"]] == [s["fingerprint"] for s in first["stages"]]


READ = {
    "data": {"source"},
    "mask": {"teacher"},
    "generate": {"data", "masks", "teacher", "student"},
    "score": {"data", "responses"},
    "train": {"data", "masks", "responses", "verdicts", "teacher", "student"},
    "evaluate": {"data", "model teacher", "model student-before", "model student-after"},
    "register": {"train", "evaluate"},
}


def test_lineage_leads_from_the_student_to_the_questions(first: dict, place: Path) -> None:
    done = masters("lineage", "easyvqa", "--json", home=place / "home")
    found = read_json(done)
    assert found["verified"]
    assert {stage["name"]: {read["role"] for read in stage["inputs"]} for stage in found["stages"]} == READ
    made = {stage["name"]: (stage["fingerprint"], stage["uri"]) for stage in first["stages"]}
    assert {stage["name"]: (stage["fingerprint"], stage["uri"]) for stage in found["stages"]} == made
    assert {read["state"] for stage in found["stages"] for read in stage["inputs"] if "state" in read} == {"same"}
    run = masters("lineage", first["mlflow"]["run_id"], home=place / "home")
    assert run.returncode == 0 and "register" in run.stdout


def test_gc_keeps_the_artifacts_of_a_candidate(first: dict, place: Path) -> None:
    done = masters("gc", "configs/easyvqa.toml", *settings(place), "--json", home=place / "home")
    gone = {item["uri"] for item in read_json(done)["items"]}
    assert not gone & {stage["uri"] for stage in first["stages"]}


def processes_of(home: Path) -> list[str]:
    """Return the command lines of the processes with this home folder."""
    return [command_line(process) for process in processes_with_variable("HOME", str(home))]


def test_a_finished_run_leaves_no_process(first: dict, place: Path) -> None:
    assert processes_of(place / "home") == []


@pytest.mark.slow
def test_responses_do_not_depend_on_the_number_of_workers(first: dict, place: Path, prefect: dict[str, str]) -> None:
    arguments = [*settings(place), "--set", f"store.root={place / 'other'}", "--set", "runtime.generate_workers=1"]
    done = masters("stage", "generate", "configs/easyvqa.toml", *arguments, "--json", home=place / "home", **prefect)
    other = read_json(done)
    assert [s["name"] for s in other["stages"]] == ["data", "mask", "generate"]
    assert rows(other, "generate", "responses") == rows(first, "generate", "responses")


def lines(place: Path, *overrides: str, rebuild: Collection[Stage] = ()) -> dict[str, dict]:
    """Return the lines of `--plan` by stage."""
    given = [part for part in settings(place) if part != "--set"]
    os.chdir(ROOT)  # the demo's configuration names its models from there
    return {line["name"]: line for line in plan(load("configs/easyvqa.toml", [*given, *overrides]), rebuild)}


def planned(place: Path, *overrides: str, rebuild: Collection[Stage] = ()) -> dict[str, str]:
    """Return the planned outcome of each stage."""
    return {name: line["outcome"] for name, line in lines(place, *overrides, rebuild=rebuild).items()}


def test_the_plan_of_a_rebuild_includes_the_stages_behind_it(first: dict, place: Path) -> None:
    outcomes = planned(place, rebuild=[Stage.SCORE])
    assert {name for name, outcome in outcomes.items() if outcome == "reused"} == {"data", "mask", "generate"}


def test_the_plan_names_changes_even_if_inputs_are_not_built(first: dict, place: Path) -> None:
    found = lines(place, "generate.temperature=0.5", "train.beta=0.2", "train.epochs=2")
    assert found["generate"]["changed"][0] == "sampling.temperature" and found["generate"]["fingerprint"]
    assert found["train"]["changed"] == ["train.beta", "train.epochs"] and found["train"]["fingerprint"] is None
    assert list(found) == ["data", "mask", "generate", "score", "train", "evaluate", "register"]
    assert {found[stage]["outcome"] for stage in ("generate", "score", "train", "evaluate", "register")} == {"built"}
    assert found["score"]["changed"] == found["evaluate"]["changed"] == found["register"]["changed"] == []


def test_the_printed_plan_names_changes(first: dict, place: Path) -> None:
    done = masters(
        "distill", "configs/easyvqa.toml", *settings(place), "--set", "train.seed=1", "--plan", home=place / "home"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "reused" in lines["score"]
    assert "built" in lines["train"] and "changed: train.seed" in lines["train"]


@pytest.mark.parametrize(
    "runtime",
    ["checkpoint_steps=7", "generate_workers=1", "train_processes=2", "engine_memory_gib=2", "max_model_len=600"],
)
def test_runtime_settings_do_not_affect_identities(first: dict, place: Path, runtime: str) -> None:
    assert set(planned(place, f"runtime.{runtime}").values()) == {"reused"}


SWITCHES = {  # of the paper's ablations: the first stage that each changes
    "data.validation_share=0.3": "data",
    "data.validation_share=0.3 evaluate.split=validation": "data",
    "teachers.0.r_max=0.4": "mask",
    "teachers.0.r_max=0.0": "mask",
    "mask.granularity=block": "mask",
    "mask.granularity=global": "mask",
    "generate.responses=4": "generate",
    "generate.student_share=0.25": "generate",
    "generate.student_share=0.0": "generate",
    "generate.student_share=1.0": "generate",
    "generate.coverage=full": "generate",
    "generate.temperature=0.9": "generate",
    "rewards.accuracy=llm runtime.max_model_len=1024": "score",
    "rewards.accuracy=llm rewards.judge=demo/models/judge runtime.max_model_len=1024": "score",
    "rewards.accuracy=off": "train",
    "rewards.distillation=raw": "train",
    "rewards.distillation=off": "train",
    "rewards.combine=gated": "train",
    "rewards.distillation_floor=0.01": "train",
    "train.divergence=kl": "train",
    "train.divergence=skew": "train",
    "train.kl=squared": "train",
    "train.schedule=cosine": "train",
    "train.max_gradient_norm=1.0": "train",
    "train.negatives=clipped": "train",
    "train.negatives=first_difference": "train",
    "train.reward_weight=0.05": "train",
    "train.balance=teacher_accuracy": "train",
    "train.objective=kd": "train",
    "train.objective=kd train.targets=labels": "train",
    "train.objective=sft train.targets=labels": "train",
    "train.objective=sft": "train",
    "train.control=shuffled_verdicts": "train",
    "train.control=random_advantages": "train",
    "train.beta=0.01": "train",
    "train.seed=1": "train",
}


@pytest.mark.parametrize(("switch", "stage"), SWITCHES.items())
def test_a_switch_affects_only_its_stage_and_those_behind_it(first: dict, place: Path, switch: str, stage: str) -> None:
    outcomes = planned(place, *switch.split())
    after = STAGES[STAGES.index(stage) :]
    assert {name: outcome for name, outcome in outcomes.items() if name not in after} == {
        name: "reused" for name in outcomes if name not in after
    }
    assert {outcomes[name] for name in after if name in outcomes} == {"built"}


def test_a_changed_model_folder_is_another_model(first: dict, place: Path) -> None:
    changed = place / "changed"
    shutil.copytree(ROOT / "demo/models/teacher", changed / "teacher")
    assert set(planned(place, f"teachers.0.model={changed / 'teacher'}").values()) == {"reused"}  # equal content
    tensors = load_file(changed / "teacher/model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, changed / "teacher/model.safetensors", {"format": "pt"})
    assert planned(place, f"teachers.0.model={changed / 'teacher'}")["mask"] == "built"


@pytest.mark.slow
def test_another_image_under_the_same_id_is_other_data(first: dict, place: Path, prefect: dict[str, str]) -> None:
    shutil.copytree(place / "data", place / "edited")
    shutil.copy(place / "edited/images/3.png", place / "edited/images/5.png")
    arguments = [*settings(place), "--set", f"data.source={place / 'edited/questions.jsonl'}"]
    done = masters("stage", "generate", "configs/easyvqa.toml", *arguments, "--json", home=place / "home", **prefect)
    stages = {s["name"]: s for s in read_json(done)["stages"]}
    assert [stages[n]["outcome"] for n in ("data", "mask", "generate")] == ["built", "reused", "built"]
    # the student's one shard, and the teacher's at the stages that lost or won the question
    assert 1 <= stages["generate"]["shards_built"] <= 3
    assert stages["generate"]["shards_reused"] >= 3


def test_too_many_rejected_rows_stop_the_run_with_one_line(first: dict, place: Path, prefect: dict[str, str]) -> None:
    arguments = [*settings(place), "--set", "data.max_rejected_share=0.01"]
    done = masters("distill", "configs/easyvqa.toml", *arguments, home=place / "home", **prefect)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "data.max_rejected_share" in line and "5 of 69" in line]
    assert "Traceback" not in done.stderr
    assert json.loads((place / "store/summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "train.lerning_rate: unknown key"),
        ("data.source=/nowhere/questions.jsonl", "not found"),
        ("store.root=/proc/masters", "store"),
        ("teachers.0.model=/nowhere", "model folder not found"),
        ("rewards={accuracy='llm', judge='/nowhere/judge'}", "rewards.judge: model folder not found: /nowhere/judge"),
        ("rewards={accuracy='llm', judge='http://user:key@host'}", "MASTERS_JUDGE_API_KEY"),
        ("rewards={accuracy='llm', judge='http://host:port'}", "rewards.judge: expected http(s)://host"),
    ],
)
def test_bad_input_is_one_clear_line_before_work_starts(override: str, message: str, place: Path) -> None:
    done = masters("check", "configs/easyvqa.toml", *settings(place), "--set", override, home=place / "home")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_different_tokenizers_are_refused(place: Path) -> None:
    other = place / "other-teacher"
    shutil.copytree(ROOT / "demo/models/teacher", other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first_token, second_token = list(vocabulary)[100:102]
    vocabulary[first_token], vocabulary[second_token] = vocabulary[second_token], vocabulary[first_token]
    (other / "tokenizer.json").write_text(json.dumps(text))
    done = masters(
        "check", "configs/easyvqa.toml", "--set", f"teachers.0.model={other}", *settings(place), home=place / "home"
    )
    assert done.returncode == 2
    assert "different tokenizers" in done.stderr
