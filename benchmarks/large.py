"""`python -m benchmarks large`: 100,000 questions through all of a run but its models; stores that hold 10,000 shards.

Questions are easy-VQA's, asked again in other words. The models are left out: whoever answers is a stand-in that says
a word at once (`benchmarks.stand_in`), rules judge, and of training only what comes before its first step is
done: groups, steps and the plan of packed passes. All else is a run's own code and its own processes. Each size runs
in a fresh process. Baselines as in `scale`: of time the smallest size's, multiplied as the questions are, of memory
the smallest size's itself. A store's are those of its smallest number of shards, multiplied likewise; one lies in
files, one on an S3 server of its own on loopback.
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
from benchmarks.measure import Row, once
from benchmarks.pipeline import CONFIG
from masters.checks.preflight import preflight
from masters.common import machine
from masters.common.hashing import digest
from masters.config.loading import load
from masters.data import question_shards
from masters.data.question_shards import Ref
from masters.data.sources.easyvqa import EasyVqa
from masters.infra import object_store, service
from masters.models.generation import shards as answering
from masters.models.generation.shards import NO_SHARD, GeneratingModel, ShardRequest
from masters.store import artifacts, tables
from masters.store.artifacts import Artifact, Identity
from masters.store.storage import Storage
from masters.tracking.run_writer import RunWriter

STAND_IN = "benchmarks.stand_in"
WORDS = ("{}", "look at the image: {}", "please answer briefly: {}")  # easy-VQA has 38,575 questions to train on
EVALUATION = 500
START_SECONDS = 60  # of an S3 server


@dataclass(frozen=True)
class Sizes:
    """Training questions of each run, shards of each store; the smallest first."""

    questions: tuple[int, ...] = (25_000, 50_000, 100_000)
    shards: tuple[int, ...] = (1_000, 10_000)


def measured(sizes: Sizes = Sizes()) -> list[Row]:
    runs = {questions: _apart(run, questions) for questions in sizes.questions}
    stores = {
        where: {count: _apart(work, count) for count in sizes.shards}
        for where, work in {"files": on_files, "S3": on_s3}.items()
    }
    return scale.rows(runs) + [row for where, found in stores.items() for row in store_rows(where, found)]


def _apart(work: Callable[[int], Any], size: int) -> Any:
    """What `work` gives for a size, in a process of its own: memory is counted by process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, size).result()


def run(questions: int) -> dict[str, dict]:
    """By stage `seconds`, `peak_mib` and, with processes of its own, `children_peak_mib`."""
    from masters.tasks import data, generate, mask, score
    from masters.tasks.run_context import Context, Round, Run

    with TemporaryDirectory(prefix="masters-bench-") as work, patch.object(answering, "ENGINE", STAND_IN):
        source = write_source(Path(work) / "source", questions)
        limits = [f"data.train_limit={questions}", f"data.eval_limit={EVALUATION}"]  # the demo's are lower
        settings = [f"data.source={source}", f"store.root={work}/store", "rewards.accuracy=rules", *limits]
        config = load(CONFIG, settings)
        context = Context(config, preflight(config))
        made = Run(context, RunWriter(config, context.storage))
        current = Round(1, config.teachers[0], context.ready.teachers[0], context.ready.student)
        table, masks = data.data.fn(made), mask.mask.fn(made, current)
        responses = generate.generate.fn(made, current, table, masks)
        verdicts = score.score.fn(made, current, table, responses)
        found = {stage["name"]: stage for stage in made.stages if stage["name"] != "mask"}
        return found | {"packing": packing(current, table, responses, verdicts, made)}


def packing(current, table: Artifact, responses: Artifact, verdicts: Artifact, made) -> dict[str, float]:
    """What the trainer does with tables before its first step."""
    from masters.models.training import groups as response_groups
    from masters.models.training import groups as training_data
    from masters.models.training import microbatches

    machine.forget_peak()
    began, train, runtime = time.monotonic(), made.config.train, made.config.runtime
    refs, ratios = question_shards.references(table, "train"), current.ratios
    coverage = made.config.generate.coverage
    groups, _ = response_groups.response_groups(refs, responses, verdicts, ratios, coverage)
    steps = training_data.plan_steps(groups, len(ratios), train.epochs, train.questions_per_step, train.seed)
    microbatches.plan(
        steps, [microbatches.size_of(group) for group in groups], runtime.token_budget, runtime.train_processes
    )
    return dict(seconds=time.monotonic() - began, peak_mib=machine.peak_mib())


def write_source(folder: Path, questions: int) -> Path:
    """A JSONL file of `questions` training questions and a few to evaluate on, and its images beside it."""
    folder.mkdir(parents=True)
    easy = EasyVqa()
    for split in ("train", "test"):
        shutil.copytree(easy.folder / split / "images", folder / split)
    with open(folder / "questions.jsonl", "w") as file:
        for row in (*islice(asked(easy, "train"), questions), *islice(asked(easy, "test"), EVALUATION)):
            file.write(json.dumps(row) + "\n")
    return folder / "questions.jsonl"


def asked(easy: EasyVqa, split: str) -> Iterator[dict]:
    """A split's questions, and then again in other words."""
    for number, words in enumerate(WORDS):
        for row in easy.rows():
            if row.split == split:
                yield dict(
                    id=f"{row.id}-{number}", image=f"{split}/{row.image}", split=split,
                    question=words.format(row.question), answer=row.answer, category=row.category,
                )  # fmt: skip


def on_files(count: int) -> dict[str, float]:
    with TemporaryDirectory(prefix="masters-bench-") as work:
        return store(f"{work}/store", count)


def on_s3(count: int) -> dict[str, float]:
    port = object_store.listener_ports()["s3.port"]
    with TemporaryDirectory(prefix="masters-bench-") as work:
        folder = Path(work)
        server = object_store.service(folder, port, dict(os.environ))
        started = service.start(server, folder, folder.name)
        try:
            service.wait(server, started, folder, START_SECONDS)
            with patch.dict(os.environ, object_store.environment_of(folder, port)):
                return store(f"s3://{object_store.BUCKETS[0]}/store", count)
        finally:
            service.stop(started)


def store(root: str, count: int) -> dict[str, float]:
    """Seconds to write shards of 1 KiB, to find what is missing among them, and to commit an artifact of them all."""
    asker = GeneratingModel("m", Path("m"), "d", {})
    order = ShardRequest(asker, NO_SHARD, "predictions", "evaluation", None, 0, 1, dict(dtype="float32"))
    storage, seconds = Storage(root), {}
    orders = [replace(order, shard=question_shards.Shard("", (_ref(number),))) for number in range(count)]
    row = dict(model="m", text="red", finish_reason="stop")

    def write() -> None:
        for each in orders:
            content = tables.encode([row | dict(question_id=each.shard.refs[0].question_id)], tables.PREDICTED)
            storage.create(each.file, content)

    def commit() -> None:
        content = digest("".join(each.fingerprint for each in orders).encode())
        identity = Identity("evaluate", 1, {}, dict(shards=content))
        artifacts.commit(storage, identity, answering.collect_shards(storage, identity, orders), {})

    for name, part in (
        ("write", write),
        ("list", lambda: answering.missing_shards(storage, orders)),
        ("commit", commit),
    ):
        began = time.monotonic()
        part()
        seconds[name] = time.monotonic() - began
    return seconds


def _ref(number: int) -> Ref:
    return Ref(digest(str(number).encode()), f"q{number}", 0, number)


def store_rows(where: str, stores: dict[int, dict[str, float]]) -> list[Row]:
    smallest = min(stores)
    return [
        once(f"store on {where}, {part} {count} shards", "s", taken, stores[smallest][part] * count / smallest)
        for count, seconds in stores.items()
        for part, taken in seconds.items()
    ]
