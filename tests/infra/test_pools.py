"""A run whose stages go to three work pools, each with a worker of its own, as on three machines that share a folder.

In order: what a pool's worker refuses; a worker killed in mid-stage together with all that it started; a cancelled run.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as parquet
import pytest

from masters.infra.api import post
from tests.fork_server import PYTHON
from tests.local_stack import RESUMED, ROOT, Stack, serve, until
from tests.shape_data import write_questions

pytestmark = pytest.mark.slow
POOLS = dict(cpu="cpu", generate="gpu-generate", train="gpu-train")
PLACES = dict(data="cpu", mask="cpu", generate="gpu-generate", score="cpu", train="gpu-train", evaluate="gpu-generate")
SECRET = "open-sesame-0123456789"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    pools = ",".join(POOLS.values())
    with serve(stack="light", pools=pools, resume_after=10, lost_after=60, judge_api_key=SECRET) as running:
        write_questions(running.folder / "data", 24)
        write_questions(running.folder / "elsewhere", 8)
        yield running


@pytest.fixture(scope="module")
def workers(stack: Stack) -> Iterator[dict[str, subprocess.Popen]]:
    """Start a worker for each pool, in separate folders and with separate limits, as on other machines."""
    started = {pool: worker(stack, pool) for pool in POOLS.values()}
    try:
        yield started
    finally:
        for process in started.values():
            kill(process)


def worker(stack: Stack, pool: str) -> subprocess.Popen:
    folder = stack.folder / f"machine-{pool}"
    folder.mkdir(exist_ok=True)
    own = {
        "PREFECT_HOME": str(folder / "prefect"), "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "MASTERS_ALLOWED_DATA": str(stack.folder / "data"),
    }  # fmt: skip
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [
                sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process",
                "--name", f"machine-of-{pool}", "--install-policy", "never",
            ],
            cwd=folder, env=stack.environment | stack.client_environment() | own, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def kill(process: subprocess.Popen) -> None:
    """Kill a worker and all its descendants, as the end of its machine would."""
    with suppress(psutil.NoSuchProcess):
        gone = psutil.Process(process.pid)
        for one in [gone, *gone.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
    process.wait()


def config(stack: Stack, **changes: object) -> dict:
    return dict(
        name="pooled", store=dict(root=str(stack.folder / "store")),
        data=dict(source=str(stack.folder / "data/questions.jsonl"), max_rejected_share=0.5),
        student=dict(model="demo/models/student"),
        teachers=[dict(model="demo/models/teacher", r_max=0.2, mask_step=0.2)],
        generate=dict(responses=2, max_tokens=8, dtype="float32"), rewards=dict(accuracy="rules"),
        train=dict(learning_rate=1e-4, questions_per_step=4), runtime=dict(max_model_len=512, pools=POOLS),
    ) | changes  # fmt: skip


def client(stack: Stack) -> dict[str, str]:
    return stack.environment | stack.client_environment()


def toml(stack: Stack, tree: dict) -> Path:
    """Write the configuration to a file."""
    path = stack.folder / f"{tree['name']}.toml"
    lines = [f'name = "{tree["name"]}"', f"teachers = [{inline(tree['teachers'][0])}]"]
    lines += [f"{key} = {inline(value)}" for key, value in tree.items() if key not in ("name", "teachers")]
    path.write_text("\n".join(lines))
    return path


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(of)}" for key, of in value.items()) + "}"
    return json.dumps(value)


def start(stack: Stack, path: Path, *arguments: str) -> subprocess.Popen:
    command = [PYTHON, "-m", "masters.cli", "distill", str(path), "--json", *arguments]
    with open(path.with_suffix(".log"), "wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=client(stack), stdout=subprocess.PIPE, stderr=log, text=True)


def test_an_error_of_a_pool_worker_is_one_line(stack: Stack, workers: dict[str, subprocess.Popen]) -> None:
    source = dict(source=str(stack.folder / "elsewhere/questions.jsonl"), max_rejected_share=0.5)
    path = toml(stack, config(stack, name="refused", data=source))
    done = start(stack, path)
    assert done.wait(600) == 2, path.with_suffix(".log").read_text()[-2000:]
    said = path.with_suffix(".log").read_text().splitlines()[-1]
    assert said.startswith("masters: data.source:") and "MASTERS_ALLOWED_DATA" in said and "pool cpu" in said
    assert not (stack.folder / "store/data").exists()


@pytest.fixture(scope="module")
def both(stack: Stack, workers: dict[str, subprocess.Popen]) -> tuple[dict, dict]:
    """Summaries of a run whose worker of the pool gpu-generate is gone in mid-stage, and another one comes, and of the
    same run in one process, into a store of its own.
    """
    run = stack.start("distill", config=config(stack))
    until(lambda: stack.children("generation.worker"), f"engines: {stack.run(run)['state']}")
    kill(workers["gpu-generate"])
    assert not stack.children("generation.worker")
    workers["gpu-generate"] = worker(stack, "gpu-generate")
    tree = config(stack, store=dict(root=str(stack.folder / "plain")), runtime=dict(max_model_len=512))
    plain = start(stack, toml(stack, tree | dict(name="plain")))  # while the loss is noticed
    told = plain.communicate(timeout=900)[0]
    assert plain.returncode == 0, (stack.folder / "plain.log").read_text()[-2000:]
    stack.complete(run, RESUMED)
    return json.loads((stack.folder / "store/summary.json").read_text()), json.loads(told.splitlines()[-1])


@pytest.fixture(scope="module")
def pooled(both: tuple[dict, dict]) -> dict:
    return both[0]


def test_a_run_completes_although_a_worker_was_killed(pooled: dict) -> None:
    assert pooled["status"] == "completed"
    assert {stage["name"]: stage["outcome"] for stage in pooled["stages"]} == dict.fromkeys(
        [*PLACES, "register"], "built"
    )


def test_the_summary_has_the_pool_of_each_stage(pooled: dict) -> None:
    assert {stage["name"]: stage["pool"] for stage in pooled["stages"] if "pool" in stage} == PLACES
    assert {stage["worker"] for stage in pooled["stages"] if stage.get("pool") == "cpu"} == {"machine-of-cpu"}
    generate = next(stage for stage in pooled["stages"] if stage["name"] == "generate")
    assert generate["engines"] == 2 and generate["worker"] == "machine-of-gpu-generate"
    assert {stage["name"]: stage["workers"] for stage in pooled["stages"] if "pool" in stage} == dict.fromkeys(
        PLACES, 1
    ) | dict(generate=2)  # the one that was killed, and the one that ended it


def test_the_killed_stage_was_requested_once_more(stack: Stack, pooled: dict) -> None:
    assert sorted(run["state_type"] for run in stages(stack, "pooled generate")) == ["COMPLETED", "CRASHED"]


def rows(store: Path, stage: str, table: str) -> list[dict]:
    found = [
        row
        for file in sorted(store.glob(f"{stage}/*/{table}/*.parquet"))
        for row in parquet.read_table(file).to_pylist()
    ]
    return sorted(found, key=json.dumps if stage != "data" else lambda row: row["question_id"])


def test_the_rows_equal_those_of_one_process(stack: Stack, both: tuple[dict, dict]) -> None:
    ours, theirs = ({stage["name"]: stage["fingerprint"] for stage in summary["stages"]} for summary in both)
    assert {name: ours[name] for name in PLACES} == {name: theirs[name] for name in PLACES}
    for stage, table in [
        ("data", "questions"),
        ("mask", "thresholds"),
        ("generate", "responses"),
        ("score", "verdicts"),
    ]:
        found = rows(stack.folder / "store", stage, table)
        assert found and found == rows(stack.folder / "plain", stage, table), stage


def test_lineage_is_complete(stack: Stack, pooled: dict) -> None:
    done = subprocess.run(
        [PYTHON, "-m", "masters.cli", "lineage", "pooled@candidate", "--json"],
        cwd=ROOT, env=client(stack), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    chain = json.loads(done.stdout.splitlines()[-1])
    assert chain["verified"]
    told = {stage["name"]: stage["mlflow_run_id"] for stage in pooled["stages"]}
    assert {stage["name"]: stage["mlflow_run_id"] for stage in chain["stages"]} == told
    for name, run_id in told.items():
        answer = httpx.get(
            f"{stack.urls['mlflow_url']}/api/2.0/mlflow/runs/get", params=dict(run_id=run_id), timeout=60
        ).json()
        tags = {tag["key"]: tag["value"] for tag in answer["run"]["data"]["tags"]}
        assert (
            tags["mlflow.parentRunId"] == pooled["mlflow"]["run_id"] and answer["run"]["info"]["status"] == "FINISHED"
        )
        metrics = {metric["key"] for metric in answer["run"]["data"]["metrics"]}
        assert ("loss" in metrics) == (name == "train")  # written by the pool's worker


def test_requests_hold_references_and_no_secrets(stack: Stack, pooled: dict) -> None:
    asked = [*stages(stack, "pooled generate"), *stages(stack, "pooled train")]
    assert len(asked) == 3 and all(set(run["parameters"]) == {"config", "assignment"} for run in asked)
    assert SECRET not in json.dumps(asked) and max(len(json.dumps(run["parameters"])) for run in asked) < 10_000
    reads = next(run["parameters"]["assignment"]["inputs"] for run in asked if run["name"] == "pooled train")
    assert all((stack.folder / "store" / folder).is_dir() for folder in reads.values()) and "responses" in reads


def test_request_files_are_removed(stack: Stack, pooled: dict) -> None:
    assert not [file for file in (stack.folder / "store/handed").rglob("*") if file.is_file()]


def stages(stack: Stack, name: str) -> list[dict]:
    """Return the requested runs of this name on all pools."""
    body = {"flows": {"name": {"any_": ["stage"]}}, "flow_runs": {"name": {"any_": [name]}}}
    return post(f"{stack.api}/flow_runs/filter", body)


def processes_of(run: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run and "prefect.engine" in process.cmdline():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def resumed(stack: Stack, pooled: dict) -> str:
    """A run is killed while its pool trains, and then resumed."""
    wanted = config(stack) | dict(train=dict(learning_rate=1e-4, questions_per_step=1, epochs=400))
    run = stack.start("distill", config=wanted, until="train")
    until(lambda: stack.children("training.worker"), "the trainer")
    for process in processes_of(run):
        process.kill()
    until(lambda: stack.run(run)["state_type"] in ("CRASHED", "SCHEDULED"), "noticed")
    until(lambda: stack.run(run)["run_count"] == 2, "its second attempt")
    return run


def test_a_resumed_run_waits_for_the_stage_that_it_requested(stack: Stack, resumed: str) -> None:
    until(lambda: "train" in tasks(stack, resumed)["RUNNING"], "it has come to train")
    asked = [run for run in stages(stack, "pooled train") if run["state_type"] != "COMPLETED"]
    assert [(run["state_type"], run["run_count"]) for run in asked] == [("RUNNING", 1)]


def tasks(stack: Stack, run: str) -> dict[str, list[str]]:
    """Return the names of a run's tasks by state."""
    found: dict[str, list[str]] = {"RUNNING": []}
    body = {"flow_runs": {"id": {"any_": [run]}}}
    for task in post(f"{stack.api}/task_runs/filter", body):
        found.setdefault(task["state_type"], []).append(task["name"])
    return found


def test_cancelling_a_run_cancels_the_stage_on_its_pool(stack: Stack, resumed: str) -> None:
    assert stack.children("training.worker")
    stack.cancel(resumed)
    until(lambda: not stack.children("training.worker"), "the trainer ends")  # two workers look every so often
    until(lambda: stack.run(resumed)["state_type"] == "CANCELLED", "cancelled")
    body = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "SCHEDULED", "CANCELLING"]}}}}
    until(lambda: post(f"{stack.api}/flow_runs/filter", body) == [], "the stage's run too")
