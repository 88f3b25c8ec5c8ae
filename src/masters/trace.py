"""From a model's name or a run's id back to the questions: what `masters lineage` shows."""

import os
import re
from pathlib import Path

from masters import chain, machine
from masters.chain import Link
from masters.errors import InputError
from masters.registry import Registry, Target, shown
from masters.storage import Storage
from masters.tracking import check_answers

RUN_ID = re.compile(r"[0-9a-f]{32}")


def trace(reference: str, mlflow_uri: str | None = None) -> dict:
    """The chain behind a model or run, every listed file read again: `verified`, `stages` and `faults`, as JSON."""
    registry, target = find(reference, mlflow_uri)
    links = chain.walk(Storage(target.store), target.folders, records=target.records)
    made = [_fingerprint(link) for link in links]
    runs = registry.run_ids(target.parent, made) if target.parent else dict.fromkeys(made)
    faults = [fault for link in links for fault in link.faults]
    return dict(
        of=target.title, mlflow=shown(registry.uri), store=target.store, verified=not faults, faults=faults,
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
    places = ", ".join(map(shown, tried))
    raise InputError(f"no registered model {name} in MLflow at {places}; name another with --mlflow-uri")


def uris(name: str | None, mlflow_uri: str | None) -> list[str]:
    """The MLflow that is named, else the environment's, else those that this machine's runs used, the last first."""
    named = mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return [named] if named else machine.remembered(name)


def available(tried: list[str]) -> list[str]:
    """Those that can be asked; of a single one InputError says why not."""
    there = []
    for uri in tried:
        try:
            check_there(uri)
            there.append(uri)
        except InputError:
            if len(tried) == 1:
                raise
    return there


def check_there(uri: str) -> None:
    """Raises InputError if there is no such MLflow: asking for a SQLite file would make it."""
    check_answers(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"there is no MLflow database at {uri}: name the right one (--mlflow-uri, or for a command that reads a "
            "configuration MLFLOW_TRACKING_URI or runtime.mlflow_uri)"
        )


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
            state=chain.state(made),
        )
        for role, made in chain.outside(link)
    ]
    return dict(
        name=record.get("stage") or link.folder.split("/")[0], fingerprint=fingerprint, uri=link.uri,
        digest=record.get("digest"), mlflow_run_id=runs[fingerprint], inputs=inputs,
        files=len(record.get("files", [])), verified=not link.faults,
    )  # fmt: skip
