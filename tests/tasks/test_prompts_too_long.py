"""A prompt that is too long for an engine is skipped, counted and reported, in `generate` and in `evaluate`.

A stand-in replaces vLLM; `Engine` itself decides which prompts it may be asked. tests/models do the same with vLLM.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from masters.common.errors import MastersError
from masters.config import Runtime, Sampling
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
from tests.handmade_run import first_round, make_run, read_stderr
from tests.shape_data import write_questions, write_rows

MAX_LENGTH, ANSWER = 128, 8  # tokens
TOO_LONG = {"q4": "test", "q5": "train"}  # prompt and answer exceed the maximum length by one token
LONGEST = {"q6": "train"}  # prompt and answer have exactly the maximum length


class FakeEngine(Engine):
    """An engine whose vLLM answers every prompt with "yes" and refuses a batch with a prompt that is too long."""

    def __init__(self, folder: Path, dtype: str, runtime: Runtime, enable_sleep: bool = False) -> None:
        self.folder, self.processor = folder, AutoProcessor.from_pretrained(folder)
        known = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
        limit = SimpleNamespace(max_model_len=min(runtime.max_model_len, known))
        self.llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(model_config=limit), generate=self._generate)

    def __exit__(self, *_: object) -> None:
        pass

    def remask(self, thresholds: dict[str, float]) -> None:
        pass

    def reset(self) -> None:
        pass

    def _sampling_params(self, request, sampling: Sampling):
        return SimpleNamespace(n=request.samples, max_tokens=sampling.max_tokens)

    def _generate(self, prompts: list[dict], params: list, use_tqdm: bool) -> list:
        outputs = []
        for prompt, sampling in zip(prompts, params, strict=True):
            inputs = self.processor(text=[prompt["prompt"]], images=[prompt["multi_modal_data"]["image"]])
            ids = inputs["input_ids"][0]
            assert len(ids) + sampling.max_tokens <= self.max_model_len, "vLLM refuses the batch"
            answer = dict(token_ids=[9], text="yes", finish_reason="stop")
            answers = [SimpleNamespace(index=number, **answer) for number in range(sampling.n)]
            outputs.append(SimpleNamespace(prompt_token_ids=list(ids), outputs=answers))
        return outputs


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run child processes in this process, one after the other."""

    def run(children: list[processes.Child], *_: object) -> processes.ProcessUsage:
        for child in children:
            child.write_job()
            worker.main(child.job_file)
        return processes.ProcessUsage()

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(worker, "Engine", FakeEngine)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve questions, some of them padded to a length in tokens."""
    folder = tmp_path_factory.mktemp("source")
    path = write_questions(folder, 12, bad=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["id"] in TOO_LONG | LONGEST:
            row["question"] = pad_question(folder / row["image"], MAX_LENGTH - ANSWER + (row["id"] in TOO_LONG))
            row["answer"] = "yes"
    return write_rows(folder, rows)


def pad_question(image: Path, tokens: int) -> str:
    """Return a question whose prompt has this number of tokens."""
    processor = AutoProcessor.from_pretrained(Path(__file__).parents[2] / "demo/models/student")
    for marks in range(400):
        question = "is there a circle" + "?" * marks
        if model_inputs(processor, question, image.read_bytes())["input_ids"].shape[1] == tokens:
            return question
    raise AssertionError(f"no question of {tokens} tokens")


def make_limited_run(folder: Path, source: Path, max_length: int = MAX_LENGTH) -> Run:
    return make_run(folder / "store", source, runtime=dict(max_model_len=max_length), generate=dict(max_tokens=ANSWER))


def run_generate(run: Run) -> Artifact:
    current = first_round(run)
    return generate.fn(run, current, data.fn(run), mask.fn(run, current))


def run_evaluate(run: Run) -> Artifact:
    return evaluate.fn(run, data.fn(run), [run.resources.student])


def test_generate_skips_a_too_long_prompt(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_limited_run(tmp_path, source)
    artifact = run_generate(run)
    reasons: dict[str, set[str]] = {}
    for row in artifact.rows("responses"):
        reasons.setdefault(row["question_id"], set()).add(row["finish_reason"])
        assert bool(row["response_token_ids"]) == bool(row["text"]) == (row["finish_reason"] != PROMPT_TOO_LONG)
    assert reasons.pop("q5") == {PROMPT_TOO_LONG} and set(map(frozenset, reasons.values())) == {frozenset({"stop"})}
    assert len(reasons) == 8 and "q6" in reasons  # the longest prompt that fits is answered
    entry = run.stages[-1]
    assert (entry["rows"], entry["rejected"], entry["prompts_too_long"]) == (artifact.facts["rows"], 2, 2)
    line = "generate: prompts longer than the engine admits: 2; their responses are empty"
    assert line in (stderr := read_stderr(capsys)) and "--rebuild generate" in stderr
    run_generate(again := make_limited_run(tmp_path, source))
    assert again.stages[-1]["outcome"] == "reused" and again.stages[-1]["prompts_too_long"] == 2
    assert line in read_stderr(capsys)


def test_evaluate_counts_a_too_long_prompt_as_wrong(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_limited_run(tmp_path, source)
    artifact = run_evaluate(run)
    rows = {row["question_id"]: row for row in artifact.rows("predictions")}
    assert (rows["q4"]["correct"], rows["q4"]["text"], rows["q4"]["finish_reason"]) == (False, "", PROMPT_TOO_LONG)
    assert {row["finish_reason"] for name, row in rows.items() if name != "q4"} == {"stop"}
    (score,) = artifact.facts["scores"].values()
    assert score["n"] == len(rows) == 3
    assert (run.stages[-1]["rejected"], run.stages[-1]["prompts_too_long"]) == (1, 1)
    assert "evaluate: prompts longer than the engine admits: 1; they count as wrong" in read_stderr(capsys)


def test_no_warning_if_all_prompts_fit(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_limited_run(tmp_path, source, MAX_LENGTH + 1)
    assert "prompts_too_long" not in run_generate(run).facts | run_evaluate(run).facts
    assert all(line["rejected"] == 0 and "prompts_too_long" not in line for line in run.stages)
    assert "longer than" not in read_stderr(capsys)


def test_no_fitting_prompt_raises_until_the_maximum_length_is_raised(tmp_path: Path, source: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "max_model_len", ANSWER + 1)
        with pytest.raises(MastersError, match=r"all \d+ prompts are longer than .*: raise runtime.max_model_len"):
            run_generate(make_limited_run(tmp_path, source))
    assert run_generate(make_limited_run(tmp_path, source)).facts["prompts_too_long"] == 2
