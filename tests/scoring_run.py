"""Run the score stage on responses written by the test, without Prefect and MLflow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from masters.checks.model_folder import LocalModel
from masters.checks.preflight import Resources, find_judge
from masters.common.hashing import digest
from masters.config import Config
from masters.config.stages import Stage
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tasks import score as stage
from masters.tasks.run_context import Context, Round, Run

Questions = dict[str, tuple[str, str | list[str]]]  # by question_id: question, and answer or accepted answers
Texts = dict[str, list[str]]  # by question_id: responses


class MemoryTracker:
    """A tracker that keeps the metrics and warnings of all stages."""

    run_id = key = "0"
    registry = SimpleNamespace(versions_made_from=lambda fingerprint: [])

    @contextmanager
    def stage(self, *_) -> Iterator:
        yield lambda artifact, entry: None

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.warnings: dict[str, str] = {}

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.metrics |= values

    def log_warning(self, name: str, text: str) -> None:
        self.warnings[name] = text


def make_run(
    store: Path,
    judge: str = "http://127.0.0.1:1/v1",
    rebuild: bool = False,
    accuracy: str = "llm",
    answers: dict | None = None,
    judge_tokens: int | None = None,
    **runtime: object,
) -> Run:
    values = dict(
        name="scored",
        store=dict(root=str(store)),
        data=dict(source="none"),
        student=dict(model="s"),
        teachers=[dict(model="t")],
        rewards=dict(accuracy=accuracy, judge=judge, judge_tokens=judge_tokens),
        answers=answers or {},
        generate=dict(dtype="float32"),
        runtime=dict(judge_requests=4, judge_timeout=10.0, max_model_len=512) | runtime,
    )
    config = Config.model_validate(values)
    models = [LocalModel(name, Path(name), digest(name.encode())) for name in ("s", "t")]
    resources = Resources(Storage(str(store)), None, models[0], models[1:], (), find_judge(config))  # pyright: ignore
    return Run(Context(config, resources), MemoryTracker(), frozenset([Stage.SCORE] if rebuild else []))  # pyright: ignore


def first_round(run: Run) -> Round:
    return Round(1, run.config.teachers[0], run.resources.teachers[0], run.resources.student)


def run_scoring(run: Run, questions: Questions, texts: Texts) -> tuple[Artifact, list[dict], dict]:
    """Return the artifact, its rows of verdicts, and the stage's entry of the summary."""
    artifact = stage.score.fn(run, first_round(run), write_question_table(run, questions), write_responses(run, texts))
    return artifact, list(artifact.rows("verdicts")), run.stages[-1]


def write_question_table(run: Run, questions: Questions) -> Artifact:
    rows = []
    for key, (question, answer) in questions.items():
        answers = [answer] if isinstance(answer, str) else answer
        rows.append(dict(question_id=key, question=question, answer=answers[0], accepted_answers=answers))
    return write_table(run.storage, "questions", [rows], tables.QUESTIONS)


def write_responses(run: Run, texts: Texts) -> Artifact:
    """Write the table `responses`, with a file for each question."""
    files = [
        [
            dict(question_id=key, source="teacher", mask_ratio=0.2, sample=n, model="t", text=text)
            for n, text in enumerate(question_texts)
        ]
        for key, question_texts in texts.items()
    ]
    return write_table(run.storage, "responses", files, tables.RESPONSES)


def write_table(storage: Storage, name: str, files: list[list[dict]], schema) -> Artifact:
    """Write an artifact of one table, whose content is its identity."""
    parts = [tables.encode(rows, schema) for rows in files]
    identity = Identity(name, 1, {}, {str(n): digest(data) for n, data in enumerate(parts)})
    written = {}
    for data in parts:
        file = f"{name}/{digest(data)[:16]}.parquet"  # named by content, as shards of responses are
        storage.write(f"{identity.folder}/{file}", data)
        written[file] = digest(data)
    return artifacts.commit(storage, identity, written, {})
