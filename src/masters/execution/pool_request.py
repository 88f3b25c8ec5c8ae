"""One stage of a run as a worker of another pool is asked for it: only references travel.

What they refer to lies in the store, where run and worker also meet: the run leaves a note, by which the worker sees
that it reaches the same store, and the worker's answer is left beside it.
"""

import json
import os
import re
import socket
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from masters.common.errors import InputError
from masters.config import Config, Model, Pools
from masters.config.fields import TEACHER
from masters.config.judge_url import is_url
from masters.config.schema import BUILT_IN
from masters.config.stages import Stage
from masters.store.artifacts import Artifact, External, Upstream
from masters.store.storage import Storage

Folder = Annotated[str, Field(pattern=r"^[a-z]+/[a-z0-9-]{1,40}-[0-9a-f]{16}$")]  # of an artifact
M = TypeVar("M", bound=Model)
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class Student(BaseModel):
    """A trained student that the first round starts from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="In tables")
    folder: Folder = Field(description="Of its train artifact")


class StageRequest(BaseModel):
    """Which stage, of which run, made from what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Key = Field(description="Where in the store run and worker meet")
    run: str = Field(pattern=r"^[0-9a-f-]{32,36}$", description="What the run that asks is known by in MLflow")
    began: AwareDatetime = Field(description="When it did: what others built since is not built again")
    tracked: Key = Field(description="The stage's run in MLflow")
    stage: str = Field(
        pattern=r"^[a-z]+(-[a-z0-9]+){0,2}$",
        description="generate, in a second round generate-2; of a mask stage alone generate-mask0, generate-2-mask0",
    )
    inputs: dict[str, Folder] = Field(default={}, description="Artifacts that it reads, by their role")
    outside: dict[str, str | None] = Field(default={}, description="Digests of what it reads from elsewhere, by role")
    models: list[str] = Field(default=[], description="Of evaluate: who is asked, in this order")
    ahead: bool = Field(default=False, description="Of generate: what evaluate asks of the same models, too")
    rebuild: list[Stage] = Field(default=[], description="Stages to build again")
    earlier: list[Folder] = Field(default=[], description="Artifacts whose answers are kept")
    known: Folder | None = Field(default=None, description="Data whose training questions are left out")
    student: Student | None = Field(default=None, description="What the first round starts from, if it was trained")

    @property
    def kind(self) -> str:
        return self.stage.split("-")[0]

    @property
    def round(self) -> int:
        found = re.fullmatch(r"[a-z]+-([0-9]+)(-mask[0-9]+)?", self.stage)
        return int(found[1]) if found else 1

    @property
    def mask_stage(self) -> int | None:
        """The mask stage that is worked on alone, None for all of a round's."""
        found = re.fullmatch(r"[a-z]+(-[0-9]+)?-mask([0-9]+)", self.stage)
        return int(found[2]) if found else None

    def check_reads(self, upstream: Upstream) -> None:
        """Raises InputError if a model or the data on this machine is not what the run that asks has found."""
        ours = outside(upstream)
        other = [role for role in sorted({*ours, *self.outside}) if ours.get(role) != self.outside.get(role)]
        if other:
            raise InputError(
                f"{self.stage} would read another {', '.join(other)} on {socket.gethostname()} than where the run was "
                "started: what lies at a path, or behind a hub's id, must be the same on every machine"
            )


def outside(upstream: Upstream) -> dict[str, str | None]:
    """By role, the digests of what a stage reads that lies in no store: machines may differ in it."""
    return {role: made.digest for role, made in upstream.items() if isinstance(made, External)}


def portable(config: Config, store: str) -> Config:
    """A configuration as another process takes it, wherever that starts: absolute paths, and no pools of its own."""

    def place(value: str, known: tuple[str, ...] = ()) -> str:
        path = Path(value).expanduser()
        return str(path.absolute()) if value not in known and not is_url(value) and path.exists() else value

    def model(of: M) -> M:
        return of.model_copy(update=dict(model=place(of.model)))

    changes = dict(
        store=config.store.model_copy(update=dict(root=store)),
        data=config.data.model_copy(update=dict(source=place(config.data.source, BUILT_IN))),
        student=model(config.student), teachers=[model(teacher) for teacher in config.teachers],
        rewards=config.rewards.model_copy(update=dict(judge=place(config.rewards.judge, (TEACHER,)))),
    )  # fmt: skip
    return without_pools(config).model_copy(update=changes)


def without_pools(config: Config) -> Config:
    """The configuration with every stage in the process that is given it."""
    return config.model_copy(update=dict(runtime=config.runtime.model_copy(update=dict(pools=Pools()))))


def ask(storage: Storage, key: str) -> None:
    """The run's note: whoever finds it reaches the run's store."""
    storage.write(f"{_meeting(key)}/asked", key.encode())


def check_asked(storage: Storage, key: str) -> None:
    """Raises InputError if the store that this process reaches is not the one of the run that asked."""
    if not storage.exists(f"{_meeting(key)}/asked"):
        raise InputError(
            f"store.root {storage.uri('')} is not the same place on {socket.gethostname()} as where the run was "
            "started, or the run is gone: stages on pools need a store that all of them reach, S3 or a shared folder"
        )


def answer(storage: Storage, key: str, artifact: Artifact, done: dict) -> None:
    """The worker's answer: where the artifact lies, how it came about, and who built it."""
    who = dict(worker=os.environ.get("PREFECT__WORKER_NAME", ""), host=socket.gethostname())
    storage.write(f"{_meeting(key)}/answer.json", json.dumps(dict(folder=artifact.folder, done=done | who)).encode())


def answered(storage: Storage, key: str) -> tuple[str, dict]:
    """The artifact's folder, and the worker's entry for the summary."""
    found = json.loads(storage.read(f"{_meeting(key)}/answer.json"))
    return found["folder"], found["done"]


def forget(storage: Storage, key: str) -> None:
    """Remove what run and worker left for each other."""
    for name in ("asked", "answer.json"):
        storage.remove(f"{_meeting(key)}/{name}")
    storage.prune(_meeting(key))


def _meeting(key: str) -> str:
    return f"handed/{key}"
