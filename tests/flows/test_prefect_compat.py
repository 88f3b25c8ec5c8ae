"""The private parts of Prefect behave as `flows/prefect_compat.py` expects, in the pinned version."""

import inspect
import subprocess
import sys
from pathlib import Path

import prefect
import pytest
from prefect import Task
from prefect.task_engine import SyncTaskRunEngine
from prefect.workers import base
from prefect.workers.process import ProcessWorker

from masters.flows import prefect_compat
from masters.flows.retries import flow_attempt

ROOT = Path(__file__).parents[2]


def test_the_version_is_the_pinned_one() -> None:
    """A new version of Prefect must be checked against `flows/prefect_compat.py` before the number is changed."""
    assert prefect.__version__ == prefect_compat.VERSION
    assert f'"prefect=={prefect_compat.VERSION}"' in (ROOT / "pyproject.toml").read_text()


def test_prefect_reports_crashes_through_the_overridden_method() -> None:
    parameters = list(inspect.signature(ProcessWorker._propose_crashed_state).parameters)
    assert parameters == ["self", "flow_run", "message", "client"]


def test_the_filter_replaces_the_worker_of_type_process() -> None:
    """Run in another process, because the replacement would last."""
    code = (
        "from prefect.utilities.dispatch import lookup_type\n"
        "from prefect.workers.base import BaseWorker\n"
        "from masters.infra.worker import Worker\n"
        "assert lookup_type(BaseWorker, 'process') is Worker"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prefect_names_the_worker_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "PREFECT__WORKER_NAME" in inspect.getsource(base)
    monkeypatch.setenv("PREFECT__WORKER_NAME", "gpu-1")
    assert prefect_compat.worker_name() == "gpu-1"
    monkeypatch.delenv("PREFECT__WORKER_NAME")
    assert prefect_compat.worker_name() == ""


def test_an_interrupt_before_a_task_has_its_run_stays_an_interrupt() -> None:
    """Prefect handles it as a crash of the task, and fails because there is no run yet."""
    engine = SyncTaskRunEngine(task=Task(lambda: None))
    with pytest.raises(KeyboardInterrupt), flow_attempt():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            engine.handle_crash(error)
