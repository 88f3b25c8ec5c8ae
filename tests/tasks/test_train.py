"""Training in its own processes: an interrupted run and one of two processes end where a plain one does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor

from masters import artifacts, processes, schemas, shards
from masters.artifacts import Artifact, Identity
from masters.config import Config
from masters.identity import digest
from masters.preflight import preflight
from masters.tasks.data import data
from masters.tasks.mask import mask
from masters.tasks.stage import Round, Run
from masters.tasks.train import train
from masters.tracking import Tracker
from tests.drawn import write_questions

ROOT = Path(__file__).parents[2]
STEPS = 10


def made_run(folder: Path, source: Path, **runtime: int) -> Run:
    """A run of two mask stages on a store of its own."""
    config = Config.model_validate(
        dict(
            name="trained", store=dict(root=str(folder)), data=dict(source=str(source)),
            student=dict(model=str(ROOT / "demo/models/student")),
            teachers=[dict(model=str(ROOT / "demo/models/teacher"), r_max=0.2, step=0.2)],
            generate=dict(responses=2, max_tokens=8), rewards=dict(accuracy="rules"),
            train=dict(learning_rate=1e-3, questions_per_step=4), runtime=runtime,
        )
    )  # fmt: skip
    ready = preflight(config)
    return Run(config, ready, Tracker(config, ready.storage), frozenset())


def write_table(run: Run, kind: str, rows: list[dict], schema) -> Artifact:
    made_of = Identity(kind, 1, {}, {}, "by-hand")
    content = schemas.encode(rows, schema)
    run.storage.write(f"{made_of.folder}/{kind}/0.parquet", content)
    return artifacts.commit(run.storage, made_of, {f"{kind}/0.parquet": digest(content)}, {"rows": len(rows)})


def by_hand(run: Run, current: Round, questions: Artifact) -> dict[str, Artifact]:
    """Responses and verdicts without an engine: the teacher is right, the student says something else."""
    processor = AutoProcessor.from_pretrained(current.student.folder)
    reader, responses, verdicts = shards.Reader(questions), [], []
    for ref in shards.references(questions, "train"):
        row = next(reader.rows((ref,)))
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
        text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        prompt = processor.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16))["input_ids"]
        own = current.ratios[0 if int(ref.digest[0], 16) < 8 else 1]
        for source, ratio, said in (("teacher", own, row["answer"]), ("student", None, "red circle")):
            key = dict(question_id=ref.question_id, source=source, mask_ratio=ratio, sample=0)
            tokens = [*processor.tokenizer(said)["input_ids"], processor.tokenizer.eos_token_id]
            responses.append(
                key | dict(model="m", seed=0, prompt_token_ids=prompt, response_token_ids=tokens, text=said,
                           finish_reason="stop")
            )  # fmt: skip
            verdicts.append(key | dict(score=float(source == "teacher"), status="ok", judge="t", explanation=""))
    return {
        "responses": write_table(run, "responses", responses, schemas.RESPONSES),
        "verdicts": write_table(run, "verdicts", verdicts, schemas.VERDICTS),
    }


def trained(run: Run) -> tuple[dict[str, torch.Tensor], dict]:
    """Weights and the stage's line of the summary."""
    current = Round(1, run.config.teachers[0], run.ready.teachers[0], run.ready.student)
    questions = data.fn(run)
    inputs = {"data": questions, "masks": mask.fn(run, current), **by_hand(run, current, questions)}
    artifact = train.fn(run, current, inputs)
    return load_file(Path(artifact.uri) / "model/model.safetensors"), run.stages[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("source"), 52, bad=False)


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    weights, done = trained(made_run(tmp_path_factory.mktemp("plain"), source))
    assert done["steps"] in (STEPS, STEPS + 1) and done["resumed_at_step"] == 0
    return weights


def test_training_moves_every_kind_of_weight(plain: dict[str, torch.Tensor]) -> None:
    before = load_file(ROOT / "demo/models/student/model.safetensors")
    assert plain.keys() == before.keys()
    moved = {name for name in plain if not torch.equal(plain[name], before[name])}
    for part in ("visual", "language_model", "embed_tokens"):
        assert any(part in name for name in moved)


def test_an_interrupted_run_goes_on_and_ends_the_same(source, plain, tmp_path, monkeypatch) -> None:
    run = made_run(tmp_path, source, checkpoint_steps=2)
    original = processes.run

    def interrupted(children, at_once, on_progress) -> None:
        def stop(name: str, line: dict) -> None:
            if line.get("event") == "step" and line["step"] >= 5:
                raise KeyboardInterrupt
            on_progress(name, dict(line))

        original(children, at_once, stop)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(run)
    weights, done = trained(made_run(tmp_path, source, checkpoint_steps=2))
    assert done["resumed_at_step"] >= 4
    assert {name for name in plain if not torch.equal(plain[name], weights[name])} == set()


def test_two_processes_train_like_one(source, plain, tmp_path) -> None:
    weights, done = trained(made_run(tmp_path, source, train_processes=2))
    assert done["processes"] == 2
    for name, expected in plain.items():  # exported in bfloat16: up to one unit in the last place may differ
        torch.testing.assert_close(weights[name].float(), expected.float(), rtol=2**-7, atol=1e-4)
