"""The real data stage over a source, without Prefect and MLflow around it."""

from pathlib import Path

from masters.checks.preflight import Ready
from masters.config import Config
from masters.data import question_table
from masters.data.sources import open_source
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks import data
from masters.tasks.run_context import Context

TOKENS = ("<|im_end|>", "<|image_pad|>")


def configured(source: object) -> Config:
    return Config.model_validate(
        dict(
            name="bad", store=dict(root="unused"), data=dict(source=str(source), max_rejected_share=1.0),
            student=dict(model="s"), teachers=[dict(model="t")],
        )
    )  # fmt: skip


def built(store: Path, source: object) -> Artifact:
    """Raises InputError where the source as a whole is at fault."""
    config, storage = configured(source), Storage(str(store))
    ready = Ready(storage, open_source(config.data), None, [], TOKENS)  # pyright: ignore
    made_of = data.identity(Context(config, ready))
    return artifacts.commit(
        storage, made_of, *question_table.write_tables(config, ready.source, storage, made_of.folder, TOKENS), {}
    )


def outcomes(artifact: Artifact) -> dict[str, str]:
    """By id: "accepted", or the reason of the rejection."""
    accepted = {row["question_id"]: "accepted" for row in artifact.rows("questions", ["question_id"])}
    return accepted | {row["id"]: row["reason"] for row in artifact.rows("rejected")}
