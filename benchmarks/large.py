"""`python -m benchmarks large`: a run without models over 100,000 questions, and stores that hold 10,000 shards.

The questions are easy-VQA's, each in several wordings. No model runs: a stand-in answers with a word at once
(`benchmarks.stand_in`), rules score, and training stops before its first step, after groups, steps and the plan of
packed passes. Everything else is the code and the processes of a run. Each size runs in a fresh process. Baselines as
in `scale`: the smallest size's time, multiplied by the growth in questions, and the smallest size's memory. A store's
baseline is the time of its smallest number of shards, multiplied likewise. One store is a folder, one an S3 server on
loopback.
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks import scale
from benchmarks.measure import Row, make_row
from benchmarks.pipeline import CONFIG
from masters.checks.preflight import preflight
from masters.common import machine
from masters.common.hashing import digest
from masters.config.loading import load
from masters.config.sampling import Sampling
from masters.data import question_shards
from masters.data.question_shards import QuestionRef
from masters.data.sources.easyvqa import EasyVqaSource
from masters.infra import object_store, service
from masters.models.generation import shards
from masters.models.generation.shards import GeneratingModel, ShardRequest
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tracking.run_writer import RunWriter

STAND_IN = "benchmarks.stand_in"
WORDINGS = ("{}", "look at the image: {}", "please answer briefly: {}")  # easy-VQA has 38,575 questions to train on
EVALUATION = 500
SERVER_START_SECONDS = 60


@dataclass(frozen=True)
class Sizes:
    """Training questions of each run, shards of each store; the smallest first."""

    questions: tuple[int, ...] = (25_000, 50_000, 100_000)
    shards: tuple[int, ...] = (1_000, 10_000)


def measure(sizes: Sizes = Sizes()) -> list[Row]:
    runs = {questions: _run_in_fresh_process(run_stages, questions) for questions in sizes.questions}
    rows = scale.make_rows(runs)
    for place, time_store in {"files": time_store_on_files, "S3": time_store_on_s3}.items():
        seconds = {count: _run_in_fresh_process(time_store, count) for count in sizes.shards}
        rows += make_store_rows(place, seconds)
    return rows


def _run_in_fresh_process(work: Callable[[int], Any], size: int) -> Any:
    """Return the result of `work`; memory is counted by process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, size).result()


def run_stages(questions: int) -> dict[str, dict]:
    """Return `seconds`, `peak_mib` and, for stages with child processes, `children_peak_mib`, by stage."""
    from masters.tasks import data, generate, mask, score
    from masters.tasks.run_context import Context, Round, Run

    with TemporaryDirectory(prefix="masters-bench-") as folder, patch.object(shards, "WORKER_MODULE", STAND_IN):
        source = write_source(Path(folder) / "source", questions)
        limits = [f"data.train_limit={questions}", f"data.eval_limit={EVALUATION}"]  # the demo's are lower
        settings = [f"data.source={source}", f"store.root={folder}/store", "rewards.accuracy=rules", *limits]
        config = load(CONFIG, settings)
        context = Context(config, preflight(config))
        run = Run(context, RunWriter(config, context.storage))
        current = Round(1, config.teachers[0], context.resources.teachers[0], context.resources.student)
        table, masks = data.data.fn(run), mask.mask.fn(run, current)
        responses = generate.generate.fn(run, current, table, masks)
        verdicts = score.score.fn(run, current, table, responses)
        stages = {stage["name"]: stage for stage in run.stages if stage["name"] != "mask"}
        return stages | {"packing": plan_training(current, table, responses, verdicts, run)}


def plan_training(current, table: Artifact, responses: Artifact, verdicts: Artifact, run) -> dict[str, float]:
    """Do what the trainer does with tables before its first step. Returns seconds and peak memory."""
    from masters.models.training import groups as training_groups
    from masters.models.training import load_balancing

    machine.reset_peak_memory()
    start, train, runtime = time.monotonic(), run.config.train, run.config.runtime
    refs, ratios = question_shards.read_refs(table, "train"), current.ratios
    coverage = run.config.generate.coverage
    groups, _ = training_groups.response_groups(refs, responses, verdicts, ratios, coverage)
    steps = training_groups.plan_steps(groups, len(ratios), train.epochs, train.questions_per_step, train.seed)
    load_balancing.plan(
        steps, [load_balancing.size_of(group) for group in groups], runtime.token_budget, runtime.train_processes
    )
    return dict(seconds=time.monotonic() - start, peak_mib=machine.peak_memory_mib())


def write_source(folder: Path, questions: int) -> Path:
    """Write a JSONL file of `questions` training questions and a few for evaluation, with its images."""
    folder.mkdir(parents=True)
    easy = EasyVqaSource()
    for split in ("train", "test"):
        shutil.copytree(easy.folder / split / "images", folder / split)
    with open(folder / "questions.jsonl", "w") as file:
        for row in (*islice(reword(easy, "train"), questions), *islice(reword(easy, "test"), EVALUATION)):
            file.write(json.dumps(row) + "\n")
    return folder / "questions.jsonl"


def reword(easy: EasyVqaSource, split: str) -> Iterator[dict]:
    """Yield a split's questions, then the same questions in other wordings."""
    for number, wording in enumerate(WORDINGS):
        for row in easy.rows():
            if row.split == split:
                yield dict(
                    id=f"{row.id}-{number}",
                    image=f"{split}/{row.image}",
                    split=split,
                    question=wording.format(row.question),
                    answer=row.answer,
                    category=row.category,
                )


def time_store_on_files(count: int) -> dict[str, float]:
    with TemporaryDirectory(prefix="masters-bench-") as folder:
        return time_store(f"{folder}/store", count)


def time_store_on_s3(count: int) -> dict[str, float]:
    port = object_store.listener_ports()["s3.port"]
    with TemporaryDirectory(prefix="masters-bench-") as name:
        folder = Path(name)
        server = object_store.make_service(folder, port, dict(os.environ))
        started = service.start_service(server, folder, folder.name)
        try:
            service.wait_until_ready(server, started, folder, SERVER_START_SECONDS)
            with patch.dict(os.environ, object_store.client_environment(folder, port)):
                return time_store(f"s3://{object_store.BUCKETS[0]}/store", count)
        finally:
            service.stop_service(started)


def time_store(root: str, count: int) -> dict[str, float]:
    """Return seconds to write shards of 1 KiB, to list the missing ones, and to commit an artifact of all of them."""
    storage, seconds = Storage(root), {}
    sampling = Sampling.greedy(max_tokens=8, dtype="float32")
    template = ShardRequest(GeneratingModel("m", Path("m"), "d"), "predictions", "evaluation", sampling)
    requests = [replace(template, shard=question_shards.Shard("", (_ref(number),))) for number in range(count)]

    def write() -> None:
        for request in requests:
            row = dict(question_id=request.shard.refs[0].question_id, model="m", text="red", finish_reason="stop")
            storage.create(request.file, tables.encode([row], tables.PREDICTED))

    def commit() -> None:
        content = digest("".join(request.fingerprint for request in requests).encode())
        identity = Identity("evaluate", 1, {}, dict(shards=content))
        artifacts.commit(storage, identity, shards.collect_shards(storage, identity, requests), {})

    parts = {"write": write, "list": lambda: shards.find_missing(storage, requests), "commit": commit}
    for name, part in parts.items():
        start = time.monotonic()
        part()
        seconds[name] = time.monotonic() - start
    return seconds


def _ref(number: int) -> QuestionRef:
    return QuestionRef(digest(str(number).encode()), f"q{number}", 0, number)


def make_store_rows(place: str, seconds_by_count: dict[int, dict[str, float]]) -> list[Row]:
    smallest = min(seconds_by_count)
    return [
        make_row(
            f"store on {place}, {part} {count} shards",
            "s",
            [taken],
            [seconds_by_count[smallest][part] * count / smallest],
        )
        for count, seconds in seconds_by_count.items()
        for part, taken in seconds.items()
    ]
