"""Arrow schemas of the tables in artifacts, and conversion between rows and Parquet files."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from masters.common.errors import ArtifactError, one_line
from masters.store.storage import Storage

text = pa.string()

TRUNCATED = "length"  # finish_reason: the response was cut at the length limit
PROMPT_TOO_LONG = "prompt_too_long"  # finish_reason: prompt and longest answer exceed the engine's context length

# `answer` is the first of `accepted_answers`; it is shown and trained on
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

# a row per training step: means over its questions; each diagnostic is a mean over the tokens or responses it counts.
# The objectives kd and sft have no rewards; only some steps measure `probe_accuracy`
HISTORY = pa.schema([
    ("step", pa.int64()), ("epoch", pa.int32()), ("stage", pa.int32()), ("mask_ratio", pa.float64()),
    ("questions", pa.int32()), ("learning_rate", pa.float64()), ("loss", pa.float64()), *REWARD,
    ("kl_to_reference", pa.float64()), ("gradient_norm", pa.float64()),
    ("questions_with_advantage", pa.float64()), ("probe_accuracy", pa.float64()), *DIAGNOSTICS,
])  # fmt: skip

# a row per response in a training step; `teacher_ratio` is the mask ratio of the teacher in the divergence
REWARDS = pa.schema([
    ("step", pa.int64()), ("epoch", pa.int32()), ("stage", pa.int32()), ("teacher_ratio", pa.float64()),
    *RESPONSE_KEY, *REWARD, ("reward", pa.float64()), ("advantage", pa.float64()),
])  # fmt: skip

# rows that an engine writes; the stage `evaluate` adds `correct`
PREDICTED = pa.schema([("question_id", text), ("model", text), ("text", text), ("finish_reason", text)])

PREDICTIONS = pa.schema([
    ("question_id", text), ("model", text), ("text", text), ("correct", pa.bool_()), ("finish_reason", text),
])  # fmt: skip

# scores of lmms-eval: `benchmark` as the user named it, `task` one of its tasks
BENCHMARK_SCORES = pa.schema([
    ("benchmark", text), ("task", text), ("version", text), ("metric", text), ("filter", text), ("value", pa.float64()),
    ("standard_error", pa.float64()), ("n", pa.int64()),
])  # fmt: skip

# `doc_id`: index in the task's data; `response`: the model's text; `filtered`: the text that was scored; `scores`: JSON
# object from metric to the task's entry for the row
BENCHMARK_SAMPLES = pa.schema([
    ("benchmark", text), ("task", text), ("doc_id", pa.int64()), ("prompt", text), ("target", text),
    ("response", text), ("filtered", text), ("scores", text),
])  # fmt: skip

PLAN = pa.schema([
    ("asker", text), ("kind", text), ("shard", text), ("question_id", text), ("question_digest", text),
])  # fmt: skip


def encode(rows: list[dict], schema: pa.Schema) -> bytes:
    """Encode rows as one Parquet file. Equal rows give equal bytes."""
    return encode_table(pa.Table.from_pylist(rows, schema=schema))


def encode_table(table: pa.Table) -> bytes:
    """Encode a table as one Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def decode(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Decode a Parquet file to a table."""
    # an Arrow thread may free a Python buffer after the interpreter has shut down, which aborts the process
    return pq.ParquetFile(pa.BufferReader(data), pre_buffer=False).read(columns=columns, use_threads=False)


def read(storage: Storage, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file of the store. Raises ArtifactError if it is damaged or lacks a column."""
    data = storage.read(name)
    try:
        return decode(data, columns)
    except (pa.ArrowException, OSError, KeyError) as error:
        reason = one_line(error, 200)
        raise ArtifactError(
            f"{storage.uri(name)} ({len(data)} bytes) cannot be read as Parquet ({reason}): rebuild the stage that "
            "wrote it with --rebuild"
        ) from error


def count_rows(data: bytes) -> int | None:
    """Return the number of rows in a Parquet file's footer; None if the file is damaged."""
    try:
        return pq.read_metadata(pa.BufferReader(data)).num_rows
    except (pa.ArrowException, OSError):
        return None
