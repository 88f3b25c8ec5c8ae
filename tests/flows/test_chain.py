"""A chain of two teachers: each has a round, and the second starts from the first one's student."""

import json
from pathlib import Path

import pytest

from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from tests.command_line import ROOT, masters, read_json, rows
from tests.shape_data import write_questions

CONFIG = """
name = "chain"
[store]
root = "{root}"
[data]
source = "{source}"
[student]
model = "{models}/student"
[[teachers]]
model = "{models}/student"    # a first, weaker teacher
r_max = 0.1
mask_step = 0.1
[[teachers]]
model = "{models}/teacher"
r_max = 0.2
mask_step = 0.2
[generate]
max_tokens = 8
dtype = "float32"
[rewards]
accuracy = "rules"
[train]
learning_rate = 1e-4
questions_per_step = 4
[runtime]
generate_workers = 2
max_model_len = 512
"""


def record(summary: dict, stage: str) -> dict:
    folder = next(s["uri"] for s in summary["stages"] if s["name"] == stage)
    return json.loads((Path(folder) / "record.json").read_text())


@pytest.mark.slow
def test_the_second_round_starts_from_the_first_rounds_student(tmp_path: Path, prefect: dict[str, str]) -> None:
    source = write_questions(tmp_path / "data", 32, bad=False)
    config, home = tmp_path / "chain.toml", tmp_path / "home"
    home.mkdir()
    config.write_text(CONFIG.format(root=tmp_path / "store", source=source, models=ROOT / "demo/models"))
    summary = read_json(masters("distill", str(config), "--json", home=home, **prefect))
    rounds = [f"{stage}{suffix}" for suffix in ("", "-2") for stage in ("mask", "generate", "score", "train")]
    assert [s["name"] for s in summary["stages"]] == ["data", *rounds, "evaluate", "register"]
    assert {s["outcome"] for s in summary["stages"]} == {"built"}
    first, second = ({r["mask_ratio"] for r in rows(summary, name, "responses")} for name in ("generate", "generate-2"))
    assert (first, second) == ({0.1, 0.0, None}, {0.2, 0.0, None})
    student = Artifact(Storage(str(tmp_path)), "", record(summary, "train")).part_digests["model"]
    assert record(summary, "train-2")["inputs"]["student"] == student
    assert len(summary["teachers"]) == 2
    lines = masters("distill", str(config), "--plan", home=home).stdout.splitlines()
    assert {line.split()[1] for line in lines} == {"reused"} and len(lines) == len(summary["stages"])
