"""The engine's process: answers the shards of one model and commits each as one Parquet file.

`python -m masters.models.generation.worker JOB.json`, or an actor on Ray. `masters.models.generation.shards` makes the
job, a `GenerationJob`.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from masters.common.hashing import digest
from masters.data.question_shards import QuestionReader
from masters.execution import child_process
from masters.execution.events import EngineStarted, ShardAnswered
from masters.models.generation.engine import Engine, Reply, Request
from masters.models.generation.job import GenerationJob, GenerationSetup, ShardPiece
from masters.store import artifacts, tables
from masters.store.storage import Storage


class Worker:
    """An engine of one model that answers shards. Its process ends with it.

    `is_reused`: the engine gets other weights later, and frees the device in between.
    """

    Setup, Piece = GenerationSetup, ShardPiece

    def __init__(self, setup: GenerationSetup, is_reused: bool = False) -> None:
        self._storage = Storage(setup.store)
        self._reader = QuestionReader(artifacts.load(self._storage, setup.data))
        self._thresholds, self._mask_ratio = setup.thresholds, 0.0
        self._engine = Engine(setup.folder, setup.dtype, setup.runtime, enable_sleep=is_reused)

    def switch_weights(self, setup: GenerationSetup) -> None:
        """Answer with the weights of another setup from now on; data and data type stay."""
        self._engine.wake()
        self._engine.load_weights(setup.folder)
        self._thresholds, self._mask_ratio = setup.thresholds, 0.0

    def sleep(self) -> None:
        """Free the device until `switch_weights`."""
        self._engine.sleep()

    def do(self, piece: ShardPiece) -> ShardAnswered:
        """Answer a shard and commit it, unless it is in the store."""
        if not self._storage.exists(piece.out):
            self._set_mask(piece.mask_ratio or 0.0)
            questions = list(self._reader.rows(piece.refs))
            replies = generate_replies(self._engine, questions, piece)
            make_rows, schema = TABLES[piece.kind]
            kept = set(piece.kept)
            rows = [
                row
                for question, question_replies in zip(questions, replies, strict=True)
                if question["question_id"] in kept
                for row in make_rows(piece, question, question_replies)
            ]
            self._storage.create(piece.out, tables.encode(rows, schema))
        return ShardAnswered(questions=len(piece.refs))

    def _set_mask(self, ratio: float) -> None:
        if ratio != self._mask_ratio:
            self._engine.remask(self._thresholds.get(ratio, {}))
            self._mask_ratio = ratio


def main(first_job: Path) -> None:
    worker = None
    for job_file in child_process.iterate_jobs(first_job):
        job = GenerationJob.model_validate_json(job_file.read_text())
        if worker is None:
            worker = Worker(job.setup, job.is_reused)
        else:
            worker.switch_weights(job.setup)
        child_process.report_event(job_file, EngineStarted())
        for piece in job.pieces:
            child_process.report_event(job_file, worker.do(piece))
        if child_process.is_persistent():
            worker.sleep()


def first_seed(piece: ShardPiece, question: dict) -> int:
    """Return the seed of a question's first sample, from the run's seed, source, mask stage and question's digest."""
    parts = (piece.sampling.seed, piece.source, piece.stage, question["question_digest"])
    return int(digest("/".join(map(str, parts)).encode())[:7], 16)


def generate_replies(engine: Engine, questions: list[dict], piece: ShardPiece) -> list[list[Reply]]:
    """Return the replies to each question."""
    requests = [Request(q["image"], q["question"], piece.samples, first_seed(piece, q)) for q in questions]
    return engine.generate(requests, piece.sampling)


def response_rows(piece: ShardPiece, question: dict, replies: list[Reply]) -> list[dict]:
    """Return the rows of the responses table for one question."""
    seed = first_seed(piece, question)
    return [
        dict(
            question_id=question["question_id"],
            source=piece.source,
            mask_ratio=piece.mask_ratio,
            sample=sample,
            model=piece.model,
            seed=seed + sample,
            prompt_token_ids=reply.prompt_token_ids,
            response_token_ids=reply.response_token_ids,
            text=reply.text,
            finish_reason=reply.finish_reason,
        )
        for sample, reply in enumerate(replies)
    ]


def prediction_rows(piece: ShardPiece, question: dict, replies: list[Reply]) -> list[dict]:
    """Return the row of the predictions table for one question."""
    (reply,) = replies
    row = dict(question_id=question["question_id"], model=piece.model, text=reply.text)
    return [row | dict(finish_reason=reply.finish_reason)]


TABLES: dict[str, tuple[Callable[[ShardPiece, dict, list[Reply]], list[dict]], pa.Schema]] = {
    "responses": (response_rows, tables.RESPONSES),
    "predictions": (prediction_rows, tables.PREDICTED),
}


if __name__ == "__main__":
    child_process.child_main(main)
