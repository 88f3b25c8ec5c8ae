"""The engine's process: answers the shards of one model and commits each as one Parquet file.

`python -m masters.models.engine_worker JOB.json`; the job is made by `masters.answering`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from masters import artifacts, processes, schemas
from masters.config import Generate, Runtime
from masters.identity import digest
from masters.models.engine import Engine, Reply, Request
from masters.rewards.rules import exact_match
from masters.shards import Reader, Ref
from masters.storage import Storage


def first_seed(shard: dict, question: dict) -> int:
    """The first sample's seed of a question: from the run's seed, who answers, the mask stage and the content."""
    parts = (shard["sampling"]["seed"], shard["source"], shard["stage"], question["question_digest"])
    return int(digest("/".join(map(str, parts)).encode())[:7], 16)


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    storage = Storage(job["store"])
    data = artifacts.load(storage, job["data"])
    reader, ratio = Reader(data), 0.0
    with Engine(Path(job["folder"]), job["dtype"], Runtime(**job["runtime"])) as engine:
        processes.report(job_file, event="engine")
        for shard in job["shards"]:
            if not storage.exists(shard["out"]):
                if (shard["mask_ratio"] or 0.0) != ratio:
                    ratio = shard["mask_ratio"] or 0.0
                    engine.remask(job["thresholds"].get(str(ratio), {}))
                questions = list(reader.rows(tuple(Ref(*ref) for ref in shard["refs"])))
                replies = answer(engine, questions, shard)
                rows_of, schema = TABLES[shard["kind"]]
                rows = [row for q, r in zip(questions, replies, strict=True) for row in rows_of(shard, q, r)]
                storage.create(shard["out"], schemas.encode(rows, schema))
            processes.report(job_file, event="shard", questions=len(shard["refs"]))


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
    asked = reply.finish_reason != schemas.PROMPT_TOO_LONG  # what was not asked is not right, whatever the answer is
    return [
        dict(
            question_id=question["question_id"], model=shard["model"], text=reply.text,
            correct=asked and exact_match(reply.text, question["answer"]), finish_reason=reply.finish_reason,
        )
    ]  # fmt: skip


TABLES: dict[str, tuple[Callable[[dict, dict, list[Reply]], list[dict]], pa.Schema]] = {
    "responses": (response_rows, schemas.RESPONSES),
    "predictions": (prediction_rows, schemas.PREDICTIONS),
}


if __name__ == "__main__":
    processes.child_main(main)
