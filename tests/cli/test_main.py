"""An unexpected error is one line without secrets, and its traceback goes into a file."""

from pathlib import Path

import pytest

from masters.cli import main

SECRET = "hunter2-hunter2"


def _fails(**_: object) -> None:
    raise RuntimeError(f"first line\nsecond line {SECRET}")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replace the commands by one that fails, and return the home folder."""
    monkeypatch.setattr(main, "app", _fails)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MASTERS_JUDGE_API_KEY", SECRET)
    return tmp_path


def test_an_unexpected_error_is_one_line(failing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main()
    output = capsys.readouterr()
    [file] = (failing / ".cache/masters/errors").iterdir()
    line = f"masters: unexpected RuntimeError: first line second line *** (traceback: {file}; please report it)\n"
    assert (ended.value.code, output.out, output.err) == (1, "", line)
    assert "in _fails" in file.read_text() and SECRET not in file.read_text()


def test_an_unexpected_error_is_one_line_without_a_saved_traceback(
    failing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (failing / ".cache").write_text("in the way")
    with pytest.raises(SystemExit):
        main.main()
    assert capsys.readouterr().err == "masters: unexpected RuntimeError: first line second line ***\n"
