"""What all stages share: a run's context, and building or reusing an artifact with its timing and tracking."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from masters import artifacts
from masters.artifacts import Artifact, Identity
from masters.config import Config
from masters.preflight import Ready
from masters.tracking import Tracker

CONSOLE = Console(stderr=True)
Build = Callable[[], tuple[dict[str, str], dict, dict]]  # files with digests, facts, how it ran


class Run:
    """One run of the pipeline: its configuration, what preflight found, where it tracks, what its stages did."""

    def __init__(self, config: Config, ready: Ready, tracker: Tracker | None, rebuild: frozenset[str]) -> None:
        self.config, self.ready, self.tracker, self.rebuild = config, ready, tracker, rebuild
        self.storage = ready.storage
        self.stages: list[dict] = []

    def work(self, identity: Identity) -> Path:
        """A local folder for a stage's job files, logs and downloads; not part of the store's artifacts."""
        base = Path(self.storage.path(".work")) if self.storage.local else Path.home() / ".cache" / "masters"
        folder = base / f"{identity.kind}-{identity.fingerprint}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fetched(self, trained: Artifact) -> Path:
        """A trained student's folder on this machine."""
        base = Path.home() / ".cache" / "masters" / trained.fingerprint
        return self.storage.download(f"{trained.folder}/model", base)

    def rebuilds(self, identity: Identity) -> bool:
        return identity.stage in self.rebuild or identity.kind in self.rebuild


def build_or_reuse(run: Run, identity: Identity, build: Build) -> Artifact:
    """The artifact of this identity: found, or built, committed and tracked. Its outcome joins the run's stages."""
    began = time.monotonic()
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
            seconds=round(time.monotonic() - began, 2), **how,
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
