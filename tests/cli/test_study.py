"""Output and exit code of `masters study`."""

import json
from pathlib import Path

import pytest

from masters.cli import main
from masters.common.errors import RunsFailed
from masters.config import Config
from masters.config.study_file import Study, arm_config

DEMO = Path(__file__).parents[2] / "configs/studies/easyvqa.toml"
REPORT = dict(markdown="| arm |\n", failed=[], arms=[])


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parents[2])


@pytest.mark.parametrize("as_json", [False, True])
def test_the_report_is_printed_even_if_runs_failed(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def run_flow(name: str, config: Config, checked: list[Config], design: Study) -> dict:
        assert checked == [arm_config(config, design, arm) for arm in design.arms]
        calls.append((name, design.name))
        if len(calls) == 2:
            raise RunsFailed("1 run failed", REPORT)
        return REPORT

    monkeypatch.setattr(main, "_run_flow", run_flow)
    main.study(DEMO, as_json)
    with pytest.raises(RunsFailed, match="1 run failed") as failed:
        main.study(DEMO, as_json)
    assert failed.value.exit_code == 1 and calls == [("study", "easyvqa")] * 2
    printed = json.dumps(REPORT) if as_json else REPORT["markdown"]
    assert capsys.readouterr().out == 2 * f"{printed}\n"
