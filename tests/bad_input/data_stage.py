"""Run the data stage on a source, without Prefect and MLflow."""

from pathlib import Path

from masters.checks.preflight import Resources
from masters.config import Config
from masters.data import question_table
from masters.data.sources import open_source
from masters.store import artifacts
from masters.store.artifacts import Artifact
from masters.store.storage import Storage
from masters.tasks import data
from masters.tasks.run_context import Context

TOKENS = ("<|im_end|>", "<|image_pad|>")


def make_config(source: object) -> Config:
    values = dict(
        name="bad",
        store=dict(root="unused"),
        data=dict(source=str(source), max_rejected_share=1.0),
        student=dict(model="s"),
        teachers=[dict(model="t")],
    )
    return Config.model_validate(values)


def build_data(store: Path, source: object) -> Artifact:
    """Build the data artifact. Raises InputError if the source as a whole is unusable."""
    config, storage = make_config(source), Storage(str(store))
    resources = Resources(storage, open_source(config.data), None, [], TOKENS)  # pyright: ignore
    identity = data.make_identity(Context(config, resources))
    written = question_table.write_tables(config, resources.source, storage, identity.folder, TOKENS)
    return artifacts.commit(storage, identity, *written, {})


def outcomes(artifact: Artifact) -> dict[str, str]:
    """Return by id "accepted", or the reason of the rejection."""
    accepted = {row["question_id"]: "accepted" for row in artifact.rows("questions", ["question_id"])}
    return accepted | {row["id"]: row["reason"] for row in artifact.rows("rejected")}
