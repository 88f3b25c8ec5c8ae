"""The request of a run that a worker of another pool builds one stage: only references travel.

The references lead into the store, where run and worker also meet. The run leaves a note there, by which the worker
sees that it reaches the same store, and the worker leaves its result beside the note.
"""

import json
import re
import socket
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from masters.common.errors import InputError
from masters.config import Config, Model, Pools
from masters.config.fields import TEACHER
from masters.config.judge_url import is_url
from masters.config.schema import BUILT_IN_SOURCES
from masters.config.stages import Stage
from masters.store.artifacts import Artifact, External, Upstream
from masters.store.storage import Storage

# the folder of an artifact in the store
Folder = Annotated[str, Field(pattern=r"^[a-z]+/[a-z0-9-]{1,40}-[0-9a-f]{16}$")]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
M = TypeVar("M", bound=Model)


class Student(BaseModel):
    """A trained student that the first round starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="The student's name in tables")
    folder: Folder = Field(description="The folder of its train artifact in the store")


class StageRequest(BaseModel):
    """Request to build one stage of a run from given inputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Key = Field(description="Names the folder in the store where run and worker meet")
    run: str = Field(pattern=r"^[0-9a-f-]{32,36}$", description="Key of the requesting run in MLflow")
    began: AwareDatetime = Field(
        description="When the requesting run began; artifacts that others built since then are not built again"
    )
    tracked: Key = Field(description="MLflow run id of the stage")
    stage: str = Field(
        pattern=r"^[a-z]+(-[a-z0-9]+){0,2}$",
        description="The stage's name: generate, in a second round generate-2; for a single mask stage generate-mask0, "
        "generate-2-mask0",
    )
    inputs: dict[str, Folder] = Field(default={}, description="Artifacts that the stage reads, by their role")
    outside: dict[str, str | None] = Field(
        default={}, description="Digests of what the stage reads from outside the store, by role"
    )
    models: list[str] = Field(default=[], description="For evaluate: the models to evaluate, in this order")
    ahead: bool = Field(
        default=False, description="For generate: also answer what evaluate will ask of the same models"
    )
    rebuild: list[Stage] = Field(default=[], description="Stages to build again")
    earlier: list[Folder] = Field(default=[], description="Artifacts of earlier runs whose shards are reused")
    known: Folder | None = Field(
        default=None, description="Data artifact whose training questions are left out of this run"
    )
    student: Student | None = Field(
        default=None, description="The student that the first round starts from, if an earlier run trained it"
    )

    @property
    def kind(self) -> str:
        """The stage's name without round and mask stage."""
        return self.stage.split("-")[0]

    @property
    def round(self) -> int:
        """The round's number, from 1."""
        found = re.fullmatch(r"[a-z]+-([0-9]+)(-mask[0-9]+)?", self.stage)
        return int(found[1]) if found else 1

    @property
    def mask_stage(self) -> int | None:
        """The single mask stage to build, None for all of the round."""
        found = re.fullmatch(r"[a-z]+(-[0-9]+)?-mask([0-9]+)", self.stage)
        return int(found[2]) if found else None

    def check_reads(self, upstream: Upstream) -> None:
        """Raise InputError if a model or the data on this machine differs from what the requesting run has found."""
        found = external_digests(upstream)
        changed = [role for role in sorted({*found, *self.outside}) if found.get(role) != self.outside.get(role)]
        if changed:
            raise InputError(
                f"{self.stage} would read another {', '.join(changed)} on {socket.gethostname()} than where the run "
                "was started: what lies at a path, or behind a hub's id, must be the same on every machine"
            )


def external_digests(upstream: Upstream) -> dict[str, str | None]:
    """Return, by role, the digests of what a stage reads from outside the store, in which machines may differ."""
    return {role: source.digest for role, source in upstream.items() if isinstance(source, External)}


def make_portable(config: Config, store: str) -> Config:
    """Return the configuration for a process in any folder: with absolute paths, and without pools."""

    def absolute(value: str, keywords: tuple[str, ...] = ()) -> str:
        path = Path(value).expanduser()
        return str(path.absolute()) if value not in keywords and not is_url(value) and path.exists() else value

    def with_absolute_path(model: M) -> M:
        return model.model_copy(update=dict(model=absolute(model.model)))

    changes = dict(
        store=config.store.model_copy(update=dict(root=store)),
        data=config.data.model_copy(update=dict(source=absolute(config.data.source, BUILT_IN_SOURCES))),
        student=with_absolute_path(config.student),
        teachers=[with_absolute_path(teacher) for teacher in config.teachers],
        rewards=config.rewards.model_copy(update=dict(judge=absolute(config.rewards.judge, (TEACHER,)))),
    )
    return without_pools(config).model_copy(update=changes)


def without_pools(config: Config) -> Config:
    """Return the configuration with every stage in the process that receives it."""
    return config.model_copy(update=dict(runtime=config.runtime.model_copy(update=dict(pools=Pools()))))


def write_note(storage: Storage, key: str) -> None:
    """Leave the note, from the run, by which a worker sees that it reaches the run's store."""
    storage.write(_note(key), key.encode())


def check_note(storage: Storage, key: str) -> None:
    """Raise InputError if this worker process reaches another store than the requesting run."""
    if not storage.exists(_note(key)):
        raise InputError(
            f"store.root {storage.uri('')} is not the same place on {socket.gethostname()} as where the run was "
            "started, or the run is gone: stages on pools need a store that all of them reach, S3 or a shared folder"
        )


def write_result(storage: Storage, key: str, artifact: Artifact, summary_entry: dict, worker: str) -> None:
    """Leave, from the worker, the artifact's folder and the stage's entry for the summary, with worker and host."""
    place = dict(worker=worker, host=socket.gethostname())
    result = dict(folder=artifact.folder, done=summary_entry | place)
    storage.write(_result(key), json.dumps(result).encode())


def read_result(storage: Storage, key: str) -> tuple[str, dict]:
    """Return, to the run, the artifact's folder and the worker's entry for the summary."""
    result = json.loads(storage.read(_result(key)))
    return result["folder"], result["done"]


def remove_note_and_result(storage: Storage, key: str) -> None:
    """Remove what run and worker left for each other."""
    storage.remove(_note(key))
    storage.remove(_result(key))
    storage.remove_empty_folders(_folder(key))


def _folder(key: str) -> str:
    return f"handed/{key}"


def _note(key: str) -> str:
    return f"{_folder(key)}/asked"


def _result(key: str) -> str:
    return f"{_folder(key)}/answer.json"
