"""A run on drawn questions without Prefect and engines: its responses and verdicts are written by the test."""

from pathlib import Path

import pytest
from transformers import AutoProcessor

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import preflight
from masters.common.hashing import digest
from masters.config import Config
from masters.data import question_shards
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.tasks import evaluate
from masters.tasks.run_context import Context, Round, Run
from masters.tracking.run_writer import RunWriter

ROOT = Path(__file__).parents[1]


def make_config(folder: Path | str, source: Path | str, teachers: list[dict] | None = None, **sections: dict) -> Config:
    """Make a configuration of two mask stages on a store of its own. `sections` override its sections."""
    values: dict = dict(
        name="trained",
        store=dict(root=str(folder)),
        data=dict(source=str(source)),
        student=dict(model=str(ROOT / "demo/models/student")),
        teachers=teachers or [dict(model=str(ROOT / "demo/models/teacher"), r_max=0.2, mask_step=0.2)],
        generate=dict(responses=2, max_tokens=8),
        rewards=dict(accuracy="rules"),
        train=dict(learning_rate=1e-3, questions_per_step=4),
    )
    return Config.model_validate(values | {name: values.get(name, {}) | section for name, section in sections.items()})


def make_run(
    folder: Path | str, source: Path | str, teachers: list[dict] | None = None, key: str = "", **sections: dict
) -> Run:
    """Make a run with the configuration of `make_config`. `key`: of the run, the same for a retry."""
    config = make_config(folder, source, teachers, **sections)
    resources = preflight(config)
    return Run(Context(config, resources), RunWriter(config, resources.storage, key))


def first_round(context: Context) -> Round:
    return Round(1, context.config.teachers[0], context.resources.teachers[0], context.resources.student)


def write_table(run: Run, kind: str, rows: list[dict], schema, part: str = "") -> Artifact:
    identity = Identity(kind, 1, {}, dict(part=part) if part else {}, "by-hand")
    content = tables.encode(rows, schema)
    run.storage.write(f"{identity.folder}/{kind}/0.parquet", content)
    return artifacts.commit(run.storage, identity, {f"{kind}/0.parquet": digest(content)}, {"rows": len(rows)})


def write_training_inputs(
    run: Run, current: Round, questions: Artifact, finish_reason: str = "stop"
) -> dict[str, Artifact]:
    """Write responses and verdicts: the teacher is correct at each mask ratio, the student answers something else."""
    processor = AutoProcessor.from_pretrained(current.student.folder)
    reader, responses, verdicts = question_shards.QuestionReader(questions), [], []
    for ref in question_shards.read_refs(questions, "train"):
        row = next(reader.rows((ref,)))
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]}
        text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        prompt = processor.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16))["input_ids"]
        teachers = [("teacher", ratio, row["answer"]) for ratio in current.ratios]
        for source, ratio, answer in (*teachers, ("student", None, "red circle")):
            key = dict(question_id=ref.question_id, source=source, mask_ratio=ratio, sample=0)
            tokens = [*processor.tokenizer(answer)["input_ids"], processor.tokenizer.eos_token_id]
            token_ids = dict(prompt_token_ids=prompt, response_token_ids=tokens)
            responses.append(key | token_ids | dict(model="m", seed=0, text=answer, finish_reason=finish_reason))
            verdicts.append(key | dict(score=float(source == "teacher"), status="ok", judge="t", explanation=""))
    return {
        "responses": write_table(run, "responses", responses, tables.RESPONSES),
        "verdicts": write_table(run, "verdicts", verdicts, tables.VERDICTS),
    }


def write_predictions(run: Run, questions: Artifact, models: list[LocalModel]) -> None:
    """Write the shards that `evaluate` requests, as if engines had answered: each model is correct."""
    columns = ["question_id", "accepted_answers"]
    answers = {row["question_id"]: row["accepted_answers"][-1] for row in questions.rows("questions", columns)}
    for request in evaluate.prediction_requests(run, questions, models):
        rows = [
            dict(question_id=ref.question_id, model=request.model.name, text=answers[ref.question_id])
            for ref in request.shard.refs
        ]
        run.storage.create(request.file, tables.encode(rows, tables.PREDICTED))


def read_stderr(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the text on stderr, its lines joined."""
    return " ".join(capsys.readouterr().err.split())
