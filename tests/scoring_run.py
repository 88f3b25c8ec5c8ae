"""The score stage on responses written by hand, without Prefect and MLflow around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import Ready, judge_of
from masters.common.hashing import digest
from masters.config import Config
from masters.config.stages import Stage
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks import score as stage
from masters.tasks.run_context import Context, Round, Run

Questions = dict[str, tuple[str, str | list[str]]]  # question and answer, or accepted answers, by id
Texts = dict[str, list[str]]  # responses by question's id


class Quiet:
    """A tracker that tracks nothing."""

    run_id = key = "0"
    registry = SimpleNamespace(made_from=lambda fingerprint: [])

    @contextmanager
    def stage(self, *_) -> Iterator:
        yield lambda artifact, done: None


def made_run(
    store: Path,
    judge: str = "http://127.0.0.1:1/v1",
    rebuild: bool = False,
    accuracy: str = "llm",
    answers: dict | None = None,
    **runtime: object,
) -> Run:
    config = Config.model_validate(
        dict(
            name="scored", store=dict(root=str(store)), data=dict(source="none"), student=dict(model="s"),
            teachers=[dict(model="t")], rewards=dict(accuracy=accuracy, judge=judge), answers=answers or {},
            generate=dict(dtype="float32"),
            runtime=dict(judge_requests=4, judge_timeout=10.0, max_model_len=512) | runtime,
        )
    )  # fmt: skip
    models = [LocalModel(name, Path(name), digest(name.encode())) for name in ("s", "t")]
    ready = Ready(Storage(str(store)), None, models[0], models[1:], (), judge_of(config))  # pyright: ignore
    return Run(Context(config, ready), Quiet(), frozenset([Stage.SCORE] if rebuild else []))  # pyright: ignore


def first_round(run: Run) -> Round:
    return Round(1, run.config.teachers[0], run.ready.teachers[0], run.ready.student)


def scored(run: Run, questions: Questions, texts: Texts) -> tuple[Artifact, list[dict], dict]:
    """The artifact, its rows of verdicts, the stage's line of the summary."""
    artifact = stage.score.fn(run, first_round(run), question_table(run, questions), responses(run, texts))
    return artifact, list(artifact.rows("verdicts")), run.stages[-1]


def question_table(run: Run, questions: Questions) -> Artifact:
    rows = []
    for key, (question, answer) in questions.items():
        answers = [answer] if isinstance(answer, str) else answer
        rows.append(dict(question_id=key, question=question, answer=answers[0], accepted_answers=answers))
    return table(run.storage, "questions", [rows], tables.QUESTIONS)


def responses(run: Run, texts: Texts) -> Artifact:
    """A file a question."""
    files = [
        [
            dict(question_id=key, source="teacher", mask_ratio=0.2, sample=n, model="t", text=text)
            for n, text in enumerate(said)
        ]
        for key, said in texts.items()
    ]
    return table(run.storage, "responses", files, tables.RESPONSES)


def table(storage: Storage, name: str, files: list[list[dict]], schema) -> Artifact:
    """An artifact of one table, its content its identity."""
    parts = [tables.encode(rows, schema) for rows in files]
    made_of = Identity(name, 1, {}, {str(n): digest(data) for n, data in enumerate(parts)})
    written = {}
    for data in parts:
        file = f"{name}/{digest(data)[:16]}.parquet"  # named by content, as shards of responses are
        storage.write(f"{made_of.folder}/{file}", data)
        written[file] = digest(data)
    return artifacts.commit(storage, made_of, written, {})
