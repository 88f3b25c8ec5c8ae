"""`masters check --parity` with the demo models, vLLM and PyTorch."""

from pathlib import Path

import pytest

from tests.command_line import masters


@pytest.mark.slow
def test_the_demo_models_pass_the_parity_check(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    arguments = ("--set", f"store.root={tmp_path / 'store'}", "--parity")
    done = masters("check", "configs/easyvqa.toml", *arguments, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    verdicts = [line.split()[0] for line in done.stdout.splitlines() if "(limit" in line]
    assert verdicts == ["ok"] * 7  # two of packing a model, the student whole, the teacher masked and whole
