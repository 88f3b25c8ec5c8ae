"""The tables that others may read, as Arrow schemas, and how rows become Parquet bytes."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from masters.common.errors import ArtifactError
from masters.store.storage import Storage

text = pa.string()

PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason: with its longest answer it exceeds what an engine admits

# `answer`: the first of `accepted_answers`, which is shown and learnt
QUESTIONS = pa.schema([
    ("question_id", text), ("question_digest", text), ("image_digest", text), ("image", pa.binary()),
    ("question", text), ("answer", text), ("accepted_answers", pa.list_(text)), ("split", text), ("category", text),
])  # fmt: skip

REJECTED = pa.schema([("id", text), ("reason", text)])

THRESHOLDS = pa.schema([
    ("tensor", text), ("mask_group", text), ("mask_ratio", pa.float64()), ("threshold", pa.float64()),
    ("numel", pa.int64()), ("zeros", pa.int64()), ("sparsity", pa.float64()),
])  # fmt: skip

RESPONSE_KEY = [("question_id", text), ("source", text), ("mask_ratio", pa.float64()), ("sample", pa.int32())]

RESPONSES = pa.schema([
    *RESPONSE_KEY, ("model", text), ("seed", pa.int64()), ("prompt_token_ids", pa.list_(pa.int32())),
    ("response_token_ids", pa.list_(pa.int32())), ("text", text), ("finish_reason", text),
])  # fmt: skip

VERDICTS = pa.schema([
    *RESPONSE_KEY, ("score", pa.float64()), ("status", text), ("judge", text), ("explanation", text),
])  # fmt: skip

JUDGEMENTS = pa.schema([
    ("triple_digest", text), ("question", text), ("reference", text), ("text", text), ("score", pa.float64()),
    ("status", text), ("explanation", text), ("reading", text),
])  # fmt: skip

REWARD = [(name, pa.float64()) for name in ("divergence", "reward_accuracy", "reward_distillation")]

DIAGNOSTICS = [(name, pa.float64()) for name in (
    "entropy", "greedy_end", "log_pi_right_teacher", "log_pi_right_student", "log_pi_wrong_teacher",
    "log_pi_wrong_student", "rare_negatives", "rare_negatives_gradient", "largest_token_kl", "distillation_agreement",
    "reward_agreement",
)]  # fmt: skip

# a training step: means over its questions, diagnostics over what each is counted in; kd and sft have no rewards, few
# steps a probe
HISTORY = pa.schema([
    ("step", pa.int64()), ("epoch", pa.int32()), ("stage", pa.int32()), ("mask_ratio", pa.float64()),
    ("questions", pa.int32()), ("learning_rate", pa.float64()), ("loss", pa.float64()), *REWARD,
    ("kl_to_reference", pa.float64()), ("gradient_norm", pa.float64()),
    ("questions_with_advantage", pa.float64()), ("probe_accuracy", pa.float64()), *DIAGNOSTICS,
])  # fmt: skip

# a response in a training step; `teacher_ratio`: of the masked teacher that the student was compared with
REWARDS = pa.schema([
    ("step", pa.int64()), ("epoch", pa.int32()), ("stage", pa.int32()), ("teacher_ratio", pa.float64()),
    *RESPONSE_KEY, *REWARD, ("reward", pa.float64()), ("advantage", pa.float64()),
])  # fmt: skip

# what an engine answers; `evaluate` adds whether it is right
PREDICTED = pa.schema([("question_id", text), ("model", text), ("text", text), ("finish_reason", text)])

PREDICTIONS = pa.schema([
    ("question_id", text), ("model", text), ("text", text), ("correct", pa.bool_()), ("finish_reason", text),
])  # fmt: skip

# of lmms-eval: `benchmark` as it was asked for, `task` one of those that it consists of
BENCHMARK_SCORES = pa.schema([
    ("benchmark", text), ("task", text), ("version", text), ("metric", text), ("filter", text), ("value", pa.float64()),
    ("standard_error", pa.float64()), ("n", pa.int64()),
])  # fmt: skip

# `doc_id`: its place in the task's data; `response`: as the model gave it; `filtered`: what was scored; `scores`: JSON,
# by metric what the task noted of the row
BENCHMARK_SAMPLES = pa.schema([
    ("benchmark", text), ("task", text), ("doc_id", pa.int64()), ("prompt", text), ("target", text),
    ("response", text), ("filtered", text), ("scores", text),
])  # fmt: skip

PLAN = pa.schema([
    ("asker", text), ("kind", text), ("shard", text), ("question_id", text), ("question_digest", text),
])  # fmt: skip


def encode(rows: list[dict], schema: pa.Schema) -> bytes:
    """Rows as one Parquet file. The same rows give the same bytes."""
    return encode_table(pa.Table.from_pylist(rows, schema=schema))


def encode_table(table: pa.Table) -> bytes:
    """A table as one Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def decode(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table."""
    # on Arrow's own threads a buffer of Python's can be freed after the interpreter is gone, which aborts the process
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=columns, use_threads=False)


def read(storage: Storage, name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file of the store as a table. Raises ArtifactError if it is none, or lacks a column."""
    data = storage.read(name)
    try:
        return decode(data, columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{storage.uri(name)} ({len(data)} bytes) cannot be read as Parquet: {said}") from error


def rows_in(data: bytes) -> int | None:
    """How many rows a Parquet file holds, by its footer; None where it is damaged."""
    try:
        return pq.read_metadata(pa.BufferReader(data)).num_rows
    except (pa.ArrowException, OSError):
        return None
