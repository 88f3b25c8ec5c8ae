"""A prompt that an engine cannot take costs that question alone: it is counted and said, in generate and in evaluate.

vLLM itself is stood in for; what it may be asked is the engine's own decision. With vLLM: tests/models.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from masters.common.errors import MastersError
from masters.config import Generate, Runtime
from masters.execution import processes
from masters.models.generation import worker
from masters.models.generation.engine import Engine
from masters.models.prompts import model_inputs
from masters.store.artifacts import Artifact
from masters.store.tables import PROMPT_TOO_LONG
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.run_context import Run
from tests.handmade_run import first_round, made_run, told
from tests.shape_data import write_questions, write_rows

ADMITTED, ANSWER = 128, 8  # tokens
LONG = {"q4": "test", "q5": "train"}  # with the answer longer than that by one token; the others' prompts are short
EDGE = {"q6": "train"}  # as long as it may be


class StandIn(Engine):
    """Its vLLM answers any prompt with the label that every model knows, and refuses a batch as vLLM does."""

    def __init__(self, folder: Path, dtype: str, runtime: Runtime, sleeps: bool = False) -> None:
        self.folder, self.processor = folder, AutoProcessor.from_pretrained(folder)
        known = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
        limit = SimpleNamespace(max_model_len=min(runtime.max_model_len, known))
        self.llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(model_config=limit), generate=self._said)

    def __exit__(self, *_: object) -> None:
        pass

    def remask(self, thresholds: dict[str, float]) -> None:
        pass

    def reset(self) -> None:
        pass

    def _sampling(self, request, sampling: Generate):
        return SimpleNamespace(n=request.samples, max_tokens=sampling.max_tokens)

    def _said(self, prompts: list[dict], wanted: list, use_tqdm: bool) -> list:
        outputs = []
        for prompt, sampling in zip(prompts, wanted, strict=True):
            made = self.processor(text=[prompt["prompt"]], images=[prompt["multi_modal_data"]["image"]])
            ids = made["input_ids"][0]
            assert len(ids) + sampling.max_tokens <= self.length, "vLLM refuses the batch"
            answers = [SimpleNamespace(index=n, token_ids=[9], text="yes", finish_reason="stop")
                       for n in range(sampling.n)]  # fmt: skip
            outputs.append(SimpleNamespace(prompt_token_ids=list(ids), outputs=answers))
        return outputs


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children run here, one after the other."""

    def run(children: list[processes.Child], *_: object) -> processes.Ran:
        for child in children:
            child.folder.mkdir(parents=True, exist_ok=True)
            child.job_file.write_text(json.dumps(child.job))
            worker.main(child.job_file)
        return processes.Ran()

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(worker, "Engine", StandIn)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions, of which some are padded to a length in tokens."""
    folder = tmp_path_factory.mktemp("source")
    path = write_questions(folder, 12, bad=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["id"] in LONG | EDGE:
            row["question"] = padded(folder / row["image"], ADMITTED - ANSWER + (row["id"] in LONG))
            row["answer"] = "yes"
    return write_rows(folder, rows)


def padded(image: Path, tokens: int) -> str:
    """A question whose prompt has so many tokens."""
    processor = AutoProcessor.from_pretrained(Path(__file__).parents[2] / "demo/models/student")
    for marks in range(400):
        question = "is there a circle" + "?" * marks
        if model_inputs(processor, question, image.read_bytes())["input_ids"].shape[1] == tokens:
            return question
    raise AssertionError(f"no question of {tokens} tokens")


def run_of(folder: Path, source: Path, admitted: int = ADMITTED) -> Run:
    return made_run(folder / "store", source, runtime=dict(max_model_len=admitted), generate=dict(max_tokens=ANSWER))


def generated(run: Run) -> Artifact:
    current = first_round(run)
    return generate.fn(run, current, data.fn(run), mask.fn(run, current))


def evaluated(run: Run) -> Artifact:
    return evaluate.fn(run, data.fn(run), [run.ready.student])


def test_generate_sets_the_question_aside(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, source)
    made = generated(run)
    reasons: dict[str, set[str]] = {}
    for row in made.rows("responses"):
        reasons.setdefault(row["question_id"], set()).add(row["finish_reason"])
        assert bool(row["response_token_ids"]) == bool(row["text"]) == (row["finish_reason"] != PROMPT_TOO_LONG)
    assert reasons.pop("q5") == {PROMPT_TOO_LONG} and set(map(frozenset, reasons.values())) == {frozenset({"stop"})}
    assert len(reasons) == 8 and "q6" in reasons  # one that just fits is asked
    entry = run.stages[-1]
    assert (entry["rows"], entry["rejected"], entry["prompts_too_long"]) == (made.facts["rows"], 2, 2)
    line = "generate: prompts longer than what the engine admits: 2; their responses are empty"
    assert line in (said := told(capsys)) and "--rebuild generate" in said
    generated(again := run_of(tmp_path, source))
    assert again.stages[-1]["outcome"] == "reused" and again.stages[-1]["prompts_too_long"] == 2
    assert line in told(capsys)


def test_evaluate_counts_it_as_wrong(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path, source)
    made = evaluated(run)
    rows = {row["question_id"]: row for row in made.rows("predictions")}
    assert (rows["q4"]["correct"], rows["q4"]["text"], rows["q4"]["finish_reason"]) == (False, "", PROMPT_TOO_LONG)
    assert {row["finish_reason"] for name, row in rows.items() if name != "q4"} == {"stop"}
    (score,) = made.facts["scores"].values()
    assert score["n"] == len(rows) == 3
    assert (run.stages[-1]["rejected"], run.stages[-1]["prompts_too_long"]) == (1, 1)
    assert "evaluate: prompts longer than what the engine admits: 1; they count as wrong" in told(capsys)


def test_where_all_prompts_fit_nothing_is_said(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, source, ADMITTED + 1)
    assert "prompts_too_long" not in generated(run).facts | evaluated(run).facts
    assert all(line["rejected"] == 0 and "prompts_too_long" not in line for line in run.stages)
    assert "longer than" not in told(capsys)


def test_where_none_fits_it_is_an_error_that_another_length_mends(tmp_path: Path, source: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "length", ANSWER + 1)
        with pytest.raises(MastersError, match=r"every prompt, of \d+, is longer than .*: raise runtime.max_model_len"):
            generated(run_of(tmp_path, source))
    assert generated(run_of(tmp_path, source)).facts["prompts_too_long"] == 2
