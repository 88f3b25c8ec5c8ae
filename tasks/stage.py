"""What all stages share: a run's context, and building or reusing an artifact with its timing and tracking."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from masters import artifacts, memory
from masters.artifacts import Artifact, Identity
from masters.config import Config, Teacher
from masters.identity import digest
from masters.models.schedule import mask_stages
from masters.preflight import LocalModel, Ready
from masters.stages import Stage
from masters.tracking import Tracker

CONSOLE = Console(stderr=True)
Build = Callable[[], tuple[dict[str, str], dict, dict]]  # files with digests, facts, how it ran


def cache() -> Path:
    """Where this machine keeps what it needs of a store that is elsewhere."""
    return Path.home() / ".cache" / "masters"


@dataclass(frozen=True)
class Round:
    """One teacher's turn in the chain, and the student as it is when the round starts."""

    number: int
    config: Teacher
    teacher: LocalModel
    student: LocalModel

    @property
    def suffix(self) -> str:
        """Of stage names: nothing in the first round, then "-2", "-3", ..."""
        return "" if self.number == 1 else f"-{self.number}"

    @property
    def ratios(self) -> list[float]:
        """The mask ratios of the round's stages, from r_max down to 0."""
        return mask_stages(self.config.r_max, self.config.step)


class Context:
    """What identities are made from: the configuration and what preflight found."""

    def __init__(self, config: Config, ready: Ready) -> None:
        self.config, self.ready, self.storage = config, ready, ready.storage

    def fetched(self, trained: Artifact) -> Path:
        """A trained student's folder on this machine. A copy is named by its content: built again, it is another."""
        return self.storage.download(f"{trained.folder}/model", cache() / "models" / trained.record["digest"][:32])


class Run(Context):
    """One run of the pipeline: also where it tracks, what is built again, and what its stages did."""

    def __init__(self, config: Config, ready: Ready, tracker: Tracker, rebuild: frozenset[Stage]) -> None:
        super().__init__(config, ready)
        self.tracker, self.rebuild = tracker, rebuild
        self.stages: list[dict] = []

    def work(self, identity: Identity) -> Path:
        """A local folder for a stage's job files, logs and downloads; not part of the store's artifacts."""
        # the jobs in it name the store: two stores must not share it
        remote = cache() / "work" / digest(self.storage.uri("").encode())[:16]
        base = Path(self.storage.path(".work")) if self.storage.local else remote
        folder = base / f"{identity.kind}-{identity.fingerprint}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def rebuilds(self, identity: Identity) -> bool:
        return identity.kind in self.rebuild


def build_or_reuse(run: Run, identity: Identity, build: Build) -> Artifact:
    """The artifact of this identity: found, or built, committed and tracked. Its outcome joins the run's stages.

    `peak_mib` there is this process's while the stage ran, `children_peak_mib` that of the processes it started.
    """
    began = time.monotonic()
    memory.forget_peak()
    if run.rebuilds(identity):
        artifacts.discard(run.storage, identity)
    artifact, how, outcome = artifacts.find(run.storage, identity), {}, "reused"
    with run.tracker.stage(identity) as tracked:
        if artifact is None:
            files, facts, how = build()
            artifact, outcome = artifacts.commit(run.storage, identity, files, facts), "built"
        done = dict(
            name=identity.stage, fingerprint=artifact.fingerprint, uri=artifact.uri, outcome=outcome,
            rows=artifact.facts.get("rows", 0), rejected=artifact.facts.get("rejected", 0),
            seconds=round(time.monotonic() - began, 2), peak_mib=round(memory.peak_mib()), **how,
        )  # fmt: skip
        tracked(artifact, done)
    run.stages.append(done)
    CONSOLE.print(
        f"{identity.stage:<12} {outcome:<7} {done['rows']:>8} rows {done['seconds']:>8.1f} s", highlight=False
    )
    return artifact


def progress_bar(name: str) -> Progress:
    """A bar on stderr with an estimate of the time left."""
    columns = (
        TextColumn(f"{name:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=CONSOLE, transient=True)
