"""The engine's process: answers the shards of one model and commits each as one Parquet file.

`python -m masters.models.generation.worker JOB.json`, or an actor on Ray; the job is made by
`masters.models.generation.shards`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from masters.common.hashing import digest
from masters.config import Generate, Runtime
from masters.data.question_shards import Reader, Ref
from masters.execution import processes
from masters.models.generation.engine import Engine, Reply, Request
from masters.store import artifacts, tables
from masters.store.storage import Storage


def first_seed(shard: dict, question: dict) -> int:
    """The first sample's seed of a question: from the run's seed, who answers, the mask stage and the content."""
    parts = (shard["sampling"]["seed"], shard["source"], shard["stage"], question["question_digest"])
    return int(digest("/".join(map(str, parts)).encode())[:7], 16)


class Answers:
    """An engine of one model that answers shards. Its process ends with it.

    `setup["stays"]`, where it is given: the engine is asked again later, and leaves the device meanwhile.
    """

    def __init__(self, setup: dict) -> None:
        self._storage = Storage(setup["store"])
        self._reader = Reader(artifacts.load(self._storage, setup["data"]))
        self._thresholds, self._ratio = setup["thresholds"], 0.0
        folder, runtime = Path(setup["folder"]), Runtime(**setup["runtime"])
        self._engine = Engine(folder, setup["dtype"], runtime, sleeps=setup.get("stays", False))

    def turn_to(self, setup: dict) -> None:
        """Answer with the weights of another setup from now on, on the same questions in the same way."""
        self._engine.wake()
        self._engine.load(Path(setup["folder"]))
        self._thresholds, self._ratio = setup["thresholds"], 0.0

    def rest(self) -> None:
        """Leave the device until `turn_to`."""
        self._engine.sleep()

    def do(self, shard: dict) -> dict:
        """Answer a shard and commit it, if it is not there; its line of progress."""
        if not self._storage.exists(shard["out"]):
            self._mask(shard["mask_ratio"] or 0.0)
            questions = list(self._reader.rows(tuple(Ref(*ref) for ref in shard["refs"])))
            replies = answer(self._engine, questions, shard)
            rows_of, schema = TABLES[shard["kind"]]
            kept = set(shard["kept"])
            pairs = ((q, r) for q, r in zip(questions, replies, strict=True) if q["question_id"] in kept)
            rows = [row for question, replied in pairs for row in rows_of(shard, question, replied)]
            self._storage.create(shard["out"], tables.encode(rows, schema))
        return dict(event="shard", questions=len(shard["refs"]))

    def _mask(self, ratio: float) -> None:
        if ratio != self._ratio:
            self._engine.remask(self._thresholds.get(str(ratio), {}))
            self._ratio = ratio


opened = Answers


def main(job_file: Path) -> None:
    answers = None
    for now in processes.jobs(job_file):
        job = json.loads(now.read_text())
        if answers is None:
            answers = opened(job)
        else:
            answers.turn_to(job)
        processes.report(now, event="engine")
        for shard in job["pieces"]:
            processes.report(now, **answers.do(shard))
        if processes.stays():
            answers.rest()


def answer(engine: Engine, questions: list[dict], shard: dict) -> list[list[Reply]]:
    """Replies per question."""
    sampling = Generate.model_construct(**shard["sampling"])
    requests = [Request(q["image"], q["question"], shard["samples"], first_seed(shard, q)) for q in questions]
    return engine.generate(requests, sampling)


def response_rows(shard: dict, question: dict, replies: list[Reply]) -> list[dict]:
    """Rows of the responses table for one question."""
    seed = first_seed(shard, question)
    return [
        dict(
            question_id=question["question_id"], source=shard["source"], mask_ratio=shard["mask_ratio"], sample=sample,
            model=shard["model"], seed=seed + sample, prompt_token_ids=reply.prompt_token_ids,
            response_token_ids=reply.response_token_ids, text=reply.text, finish_reason=reply.finish_reason,
        )
        for sample, reply in enumerate(replies)
    ]  # fmt: skip


def prediction_rows(shard: dict, question: dict, replies: list[Reply]) -> list[dict]:
    """Row of the predictions table for one question."""
    (reply,) = replies
    return [
        dict(
            question_id=question["question_id"], model=shard["model"], text=reply.text,
            finish_reason=reply.finish_reason,
        )
    ]  # fmt: skip


TABLES: dict[str, tuple[Callable[[dict, dict, list[Reply]], list[dict]], pa.Schema]] = {
    "responses": (response_rows, tables.RESPONSES),
    "predictions": (prediction_rows, tables.PREDICTED),
}


if __name__ == "__main__":
    processes.child_main(main)
