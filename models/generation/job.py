"""Jobs of the generation and benchmark processes. Imports no torch."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from masters.config import Runtime
from masters.config.sampling import Sampling
from masters.data.question_shards import QuestionRef
from masters.execution.engines import EngineJob, EnginePiece, EngineSetup


class GenerationSetup(EngineSetup):
    """A model and the data that it answers. `thresholds` by mask ratio, then tensor name; none for the whole model."""

    model_config = ConfigDict(extra="forbid")

    data: str
    folder: Path
    dtype: str
    thresholds: dict[float, dict[str, float]]


class ShardPiece(EnginePiece):
    """A shard to answer. `refs` are answered as one batch; the rows of the questions in `kept` are stored."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["responses", "predictions"]
    model: str
    source: str
    mask_ratio: float | None
    stage: int
    samples: int
    sampling: Sampling
    refs: tuple[QuestionRef, ...]
    kept: tuple[str, ...]


class GenerationJob(EngineJob):
    setup: GenerationSetup
    pieces: tuple[ShardPiece, ...]


class BenchmarkJob(BaseModel):
    """Benchmarks for lmms-eval to run with one model.

    `task_folders` hold the user's own tasks; `include_defaults`: also know lmms-eval's. `limit`: documents a task, None
    for all. Results go to `results/N.json` for the N-th task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path
    tasks: tuple[str, ...]
    task_folders: tuple[str, ...]
    include_defaults: bool
    limit: int | None
    dtype: str
    max_tokens: int
    results: Path
    runtime: Runtime


class BenchmarkDone(BaseModel):
    """Event of the benchmark process: a task's results are written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: Literal["benchmark"] = "benchmark"
    task: str
    documents: int
