"""From a model's name or a run's id back to the questions: what `masters lineage` shows."""

import re
from collections.abc import Callable
from pathlib import Path

from masters.common.errors import InputError, MastersError
from masters.common.hashing import model_digest
from masters.config import Data
from masters.config.schema import BUILT_IN
from masters.data.sources import open_source
from masters.store import lineage
from masters.store.lineage import Link
from masters.store.storage import Storage
from masters.tracking.client import redact_uri
from masters.tracking.locations import available, uris
from masters.tracking.registry import Registry, Target

RUN_ID = re.compile(r"[0-9a-f]{32}")


def trace(reference: str, mlflow_uri: str | None = None) -> dict:
    """The chain behind a model or run, every listed file read again: `verified`, `stages` and `faults`, as JSON."""
    registry, target = find(reference, mlflow_uri)
    links = lineage.walk(Storage(target.store), target.folders, records=target.records)
    made = [_fingerprint(link) for link in links]
    runs = registry.run_ids(target.parent, made) if target.parent else dict.fromkeys(made)
    faults = [fault for link in links for fault in link.faults]
    return dict(
        of=target.title, mlflow=redact_uri(registry.uri), store=target.store, verified=not faults, faults=faults,
        stages=[_stage(link, links, runs) for link in links],
    )  # fmt: skip


def find(reference: str, mlflow_uri: str | None) -> tuple[Registry, Target]:
    """What `name`, `models:/name/3`, `name@champion` or a run's id stands for, and in which MLflow."""
    name, selector = parse(reference)
    if selector is None and RUN_ID.fullmatch(name):
        for uri in available(uris(None, mlflow_uri)):
            registry = Registry(uri)
            if target := registry.target_of_run(name):
                return registry, target
        raise InputError(f"run {name} is in no MLflow known here; name its MLflow with --mlflow-uri")
    registry = registry_of(name, mlflow_uri)
    return registry, registry.target_of_model(name, selector)


def registry_of(name: str, mlflow_uri: str | None = None) -> Registry:
    """The MLflow that has a registered model of this name."""
    tried = uris(name, mlflow_uri)
    if not tried:
        raise InputError(f"no run of {name} was made on this machine: name its MLflow with --mlflow-uri")
    for uri in available(tried):
        registry = Registry(uri)
        if registry.has(name):
            return registry
    places = ", ".join(map(redact_uri, tried))
    raise InputError(f"no registered model {name} in MLflow at {places}; name another with --mlflow-uri")


def parse(reference: str) -> tuple[str, str | None]:
    """Name, and version number or "@alias" if one is given."""
    name, separator, selector = reference.removeprefix("models:/").partition("/")
    if separator:
        return name, selector
    name, at, alias = name.partition("@")
    return name, f"@{alias}" if at else None


def _fingerprint(link: Link) -> str:
    return (link.record or {}).get("fingerprint") or link.folder.rsplit("-", 1)[-1]


def _stage(link: Link, links: list[Link], runs: dict[str, str | None]) -> dict:
    record, fingerprint = link.record or {}, _fingerprint(link)
    uri = {other.folder: other.uri for other in links}
    inputs = [
        dict(
            role=role,
            name=made["stage"],
            fingerprint=made["fingerprint"],
            uri=uri[made["folder"]],
            digest=made["digest"],
        )
        for role, made in link.upstream.items()
        if made["kind"] == "artifact"
    ]
    inputs += [
        dict(
            role=role,
            name=made["kind"],
            fingerprint=None,
            uri=made["uri"],
            digest=made["digest"],
            state=state(made),
        )
        for role, made in lineage.outside(link)
    ]
    return dict(
        name=record.get("stage") or link.folder.split("/")[0], fingerprint=fingerprint, uri=link.uri,
        digest=record.get("digest"), mlflow_run_id=runs[fingerprint], inputs=inputs,
        files=len(record.get("files", [])), verified=not link.faults,
    )  # fmt: skip


def state(made: dict) -> str:
    """What became of an input from outside the store: "same", "changed since", "not here", or "not checked"."""
    digests: dict[str, Callable[[str], str]] = {
        "model": lambda folder: model_digest(Path(folder)),
        "source": _source_digest,
    }
    if made["digest"] is None or made["kind"] not in digests:
        return "not checked"
    if not Path(made["uri"]).exists() and made["uri"] not in BUILT_IN:
        return "not here"
    try:
        return "same" if digests[made["kind"]](made["uri"]) == made["digest"] else "changed since"
    except (MastersError, OSError):
        return "changed since"


def _source_digest(place: str) -> str:
    return open_source(Data(source=place)).digest()
