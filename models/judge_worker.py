"""The judge's process: gives verdicts on batches of triples and keeps what was said, a Parquet file a batch.

`python -m masters.models.judge_worker JOB.json`; the job is made by `masters.judging`.
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path

from masters import processes, schemas
from masters.config import Runtime
from masters.judging import row
from masters.rewards.judge import Voice, judge
from masters.rewards.verdict import FINAL, Triple
from masters.storage import Storage


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    storage = Storage(job["store"])
    with voice_of(job["reach"], Runtime(**job["runtime"])) as voice:
        processes.report(job_file, event="ready")
        for batch in job["batches"]:
            triples = [Triple(*parts) for parts in batch["triples"]]
            judged = list(zip(triples, judge(voice, triples), strict=True))
            final = [row(triple, verdict) for triple, verdict in judged if verdict.status in FINAL]
            if final:
                storage.create(batch["out"], schemas.encode(final, schemas.JUDGEMENTS))
            others = [[t.digest, v.status, v.explanation] for t, v in judged if v.status not in FINAL]
            processes.report(job_file, event="batch", triples=len(triples), others=others)


def voice_of(reach: dict, runtime: Runtime) -> AbstractContextManager[Voice]:
    """Who answers: the server at a URL, or an engine on a folder. Only the one that is needed is imported."""
    if "url" in reach:
        from masters.rewards.judge_server import Server

        return Server(reach["url"], reach["model"], runtime.judge_requests, runtime.judge_timeout)
    from masters.models.judge_engine import EngineVoice

    return EngineVoice(Path(reach["folder"]), reach["dtype"], runtime, reach["own_code"])


if __name__ == "__main__":
    processes.child_main(main)
