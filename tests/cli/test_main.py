"""The command line's last resort: an error that nobody expected is one line too, and its traceback is kept."""

from pathlib import Path

import pytest

from masters.cli import main

SECRET = "hunter2-hunter2"


def _fails(**_: object) -> None:
    raise RuntimeError(f"first line\nsecond line {SECRET}")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The home of who calls."""
    monkeypatch.setattr(main, "app", _fails)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MASTERS_JUDGE_API_KEY", SECRET)
    return tmp_path


def test_an_unexpected_error_is_one_line(failing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = capsys.readouterr()
    [kept] = (failing / ".cache/masters/errors").iterdir()
    line = f"masters: unexpected RuntimeError: first line second line *** (traceback: {kept}; please report it)\n"
    assert (ended.value.code, said.out, said.err) == (1, "", line)
    assert "in _fails" in kept.read_text() and SECRET not in kept.read_text()


def test_also_where_nothing_can_be_kept(failing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (failing / ".cache").write_text("in the way")
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "masters: unexpected RuntimeError: first line second line ***\n"
