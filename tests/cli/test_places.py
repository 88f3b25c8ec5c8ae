"""Places: commands that are printed can be pasted, relative paths are named with their folder, a home folder is needed
only for what is kept there."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from masters.cli.output import show_summary
from masters.common.errors import InputError
from masters.config.loading import load
from masters.data.sources import open_source
from masters.models.model_loading import resolve_model_folder
from tests.command_line import ROOT, masters

DEMO = ROOT / "configs/easyvqa.toml"


@pytest.mark.parametrize("folder", ["/plain", "/my store", "/größe", "/it's", '/say "x"', "/$HOME;ls", "/a&b"])
def test_the_command_for_mlflow_can_be_pasted(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{folder}/mlflow.db"
    show_summary(dict(stages=[], mlflow=dict(tracking_uri=uri)))
    for line, name in zip(capsys.readouterr().out.splitlines()[-2:], ("mlflow", "prefect"), strict=True):
        program, *arguments = shlex.split(line.partition(": ")[2])
        found = shutil.which(program)
        assert found and Path(found).name == name
        if name == "mlflow":
            assert arguments == ["ui", "--host", "127.0.0.1", "--backend-store-uri", uri]


def test_the_address_of_a_server_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    show_summary(dict(stages=[], mlflow=dict(tracking_uri="http://127.0.0.1:5000")))
    assert "look at the run: http://127.0.0.1:5000\n" in capsys.readouterr().out


def test_messages_name_the_folder_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"configuration not found: a.toml in the folder {tmp_path}"):
        load("a.toml")
    with pytest.raises(InputError, match=f"model folder not found: demo/models/student in the folder {tmp_path}"):
        resolve_model_folder("demo/models/student", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=f"model models/student is neither a folder in {tmp_path} nor reachable"):
        resolve_model_folder("models/student", None)
    data = load(DEMO, ["data.source=data/questions.jsonl"]).data
    with pytest.raises(InputError, match=f"source not found: data/questions.jsonl in the folder {tmp_path}"):
        open_source(data)


@pytest.mark.parametrize("command", [("check",), ("stage", "data")])
def test_a_home_that_cannot_be_written_is_refused_by_its_setting(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(tmp_path, *command, HOME="/proc/none")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("masters: /proc/none/.prefect, the folder for Prefect's history, cannot be written (")
    assert line.endswith("): set PREFECT_HOME or HOME to another folder")


def test_an_unwritable_home_is_enough_where_prefect_has_another_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "check", HOME="/proc/none", PREFECT_HOME=str(tmp_path / "prefect"))
    assert done.returncode == 0 and done.stdout.endswith("ready\n"), done.stderr


def run(tmp_path: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return masters(*command, str(DEMO), "--set", f"store.root={tmp_path / 'store'}", home=tmp_path, **variables)
