"""`masters up` refuses invalid settings with one line, before anything is started."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from masters.common.errors import InputError
from masters.infra import object_store, prefect_server, stack
from masters.infra.settings import Settings


def masters(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "masters.cli", *arguments],
        env=os.environ | {"MASTERS_HOME": str(home)} | environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_a_port_in_use_is_named_with_its_setting(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        done = masters("up", home=tmp_path, MASTERS_PREFECT_PORT=port)
    assert done.returncode == 2
    assert f"port {port} cannot be bound" in done.stderr and "MASTERS_PREFECT_PORT" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock"]


@pytest.mark.parametrize("setting", ["MASTERS_PREFECT_PORT", "MASTERS_RUNS_AT_ONCE", "MASTERS_RESUMES"])
def test_a_setting_that_is_not_a_number_is_refused(setting: str, tmp_path: Path) -> None:
    done = masters("up", home=tmp_path, **{setting: "many"})
    assert (done.returncode, done.stderr) == (2, f"masters: {setting}: expected a whole number, found 'many'\n")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("PREFECT_PORT", "0"),
        ("MLFLOW_PORT", "65536"),
        ("RUNS_AT_ONCE", "0"),
        ("LOST_AFTER", "30"),
        ("RESUME_AFTER", "9"),
    ],
)
def test_a_setting_outside_its_range_is_refused(setting: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MASTERS_{setting}", value)
    with pytest.raises(InputError, match=rf"MASTERS_{setting}: expected a whole number from \d+ to \d+, found {value}"):
        Settings.from_environment()


def test_another_kind_of_stack_is_refused_as_usage(tmp_path: Path) -> None:
    assert masters("up", home=tmp_path, MASTERS_STACK="huge").returncode == 2


def test_down_without_a_stack_creates_no_folder(tmp_path: Path) -> None:
    done = masters("down", home=tmp_path / "none")
    assert (done.returncode, done.stdout) == (0, "nothing is running\n")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("option", ["--host", "--bind", "--address"])
def test_there_is_no_option_to_listen_elsewhere(option: str, tmp_path: Path) -> None:
    """Prefect and MLflow have no authentication, so they listen on loopback; a reverse proxy may authenticate."""
    done = masters("up", option, "0.0.0.0", home=tmp_path)
    assert done.returncode == 2 and "No such option" in done.stderr
    assert not list(tmp_path.iterdir())


def test_no_setting_makes_it_listen_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands name the address, whatever the environment has."""
    for name in ("PREFECT_SERVER_API_HOST", "MLFLOW_HOST", "MASTERS_HOST", "HOST"):
        monkeypatch.setenv(name, "0.0.0.0")
    environment = stack._environment(tmp_path)
    mlflow = stack._mlflow(Settings(), environment, "sqlite://", "files").command
    assert mlflow[mlflow.index("--host") + 1] == "127.0.0.1"
    served: list[str] = []
    monkeypatch.setattr("prefect.server.api.server.create_app", lambda **_: None)
    monkeypatch.setattr(prefect_server.uvicorn, "run", lambda *_, host, **__: served.append(host))
    prefect_server.main(4200)
    assert served == ["127.0.0.1"]
    store = object_store.server_command(tmp_path, object_store.listener_ports(), ())
    assert "-ip.bind=127.0.0.1" in store and "-ip=127.0.0.1" in store
