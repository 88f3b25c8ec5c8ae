"""Bad input on the command line: exit code 2 and one line on stderr, before anything is written to the store."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import fake_judge
from tests.bad_input.test_weights import GATE, set_element
from tests.fork_server import PYTHON
from tests.judge_modes import PARAMETERS
from tests.shape_data import write_questions

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/easyvqa.toml"
STUDENT = ROOT / "demo/models/student"


def masters(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MASTERS_", "MLFLOW_"))}
    return subprocess.run(
        [PYTHON, "-m", "masters.cli", *arguments],
        env=kept | environment, cwd=ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


class Case:
    """A command on the demo's configuration with one fault, and a part of its error line."""

    def __init__(self, message: str, *values: str, command: str = "check", **environment: str) -> None:
        self.message, self.values, self.command, self.environment = message, values, command, environment


CASES = {
    "NaN": Case("train.beta: Input should be a finite number", "train.beta=nan", command="distill"),
    "stages without end": Case("into more than 1000 stages", "teachers.0.mask_step=1e-9", command="distill"),
    "NaN weights": Case(f"tensor {GATE} holds NaN", "student.model=nan", command="distill"),
    "a parquet that is none": Case("expected a Parquet file, found something else", "data.source=bad.parquet"),
    "a store that is not allowed": Case(
        "store.root", "store.root=/elsewhere/store", MASTERS_ALLOWED_STORES="/srv/masters", command="distill"
    ),
    "a link to a source that is not allowed": Case(
        "data.source", "data.source=link.jsonl", MASTERS_ALLOWED_DATA="{top}"
    ),
    "a judge that is not allowed": Case(
        "MASTERS_ALLOWED_JUDGES allows 127.0.0.1:1", "rewards.accuracy=llm", "rewards.judge=http://127.0.0.1:2/v1",
        MASTERS_ALLOWED_JUDGES="127.0.0.1:1",
    ),
    "a judge that is not there": Case(
        "http://127.0.0.1:9/v1 does not answer (APIConnectionError", "rewards.accuracy=llm",
        "rewards.judge=http://127.0.0.1:9/v1",
    ),
    "an MLflow that is not there, named before what the models are refused for": Case(
        "MLflow at http://127.0.0.1:9 does not answer", "runtime.mlflow_uri=http://127.0.0.1:9",
        "runtime.tensor_parallel_size=3",
    ),
    "a tracking database that cannot be created": Case(
        "the folder for the tracking database /proc/none/mlflow.db, cannot be written",
        "runtime.mlflow_uri=sqlite:////proc/none/mlflow.db",
    ),
    "a password in a source": Case("contains a password or a key", "data.source=https://me:hunter22@host/x.jsonl"),
}  # fmt: skip


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write broken models and sources under the names that the cases use."""
    top = tmp_path_factory.mktemp("cases")
    shutil.copytree(STUDENT, top / "nan")
    set_element(GATE, float("nan"))(top / "nan")
    (top / "bad.parquet").write_bytes(b"PAR1 nothing")
    outside = tmp_path_factory.mktemp("outside")
    (top / "link.jsonl").symlink_to(write_questions(outside / "data", 8))
    return top


@pytest.fixture(scope="module")
def done(top: Path) -> dict[str, subprocess.CompletedProcess]:
    """Run the command of every case, two at a time."""

    def run(name: str) -> subprocess.CompletedProcess:
        case = CASES[name]
        values = [f"store.root={top / 'store'}", f"data.source={write_source(top)}"] + [
            f"{key}={top / value}"
            if key.split(".")[-1] in ("model", "source") and "://" not in value
            else f"{key}={value}"
            for key, _, value in (each.partition("=") for each in case.values)
        ]
        options = [part for value in values for part in ("--set", value)]
        environment = {key: value.format(top=top) for key, value in case.environment.items()}
        return masters(case.command, str(DEMO), *options, **environment)

    write_source(top)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


def write_source(top: Path) -> Path:
    return top / "good/questions.jsonl" if (top / "good").exists() else write_questions(top / "good", 8, bad=False)


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_and_exit_code_2(done: dict[str, subprocess.CompletedProcess], name: str) -> None:
    ran = done[name]
    lines = ran.stderr.strip().splitlines()
    assert (ran.returncode, len(lines)) == (2, 1), ran.stderr
    assert lines[0].startswith("masters: ") and CASES[name].message in lines[0]
    assert "hunter22" not in ran.stderr + ran.stdout


def test_nothing_was_written(done: dict[str, subprocess.CompletedProcess], top: Path) -> None:
    assert not list((top / "store").rglob("*record.json")) and not (top / "store/mlflow.db").exists()


def test_valid_configuration_is_ready_and_its_judge_is_asked(top: Path) -> None:
    with fake_judge.serve(respond=PARAMETERS["only max_completion_tokens"].respond) as judge:
        values = [f"store.root={top / 'store'}", f"data.source={write_source(top)}", "rewards.accuracy=llm"]
        options = [part for value in [*values, f"rewards.judge={judge.url}"] for part in ("--set", value)]
        ran = masters("check", str(DEMO), *options)
    assert ran.returncode == 0 and ran.stdout.endswith("ready\n"), ran.stderr
    assert f"judge      {judge.url}: verdict 1 on a right answer in " in ran.stdout
    assert "(2 calls with max_completion_tokens, temperature 0, a system turn)" in ran.stdout
    # 6 training questions with 8 responses each; the server counts 100 tokens a call
    assert "judging    at most 48 texts (equal ones are judged once) of 200 tokens each" in ran.stdout
