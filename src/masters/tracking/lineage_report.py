"""Traces a model or run back to its questions: the report of `masters lineage`."""

import re
from collections.abc import Callable
from pathlib import Path

from masters.common.errors import InputError, MastersError
from masters.common.hashing import model_digest
from masters.config import Data
from masters.config.schema import BUILT_IN_SOURCES
from masters.data.sources import open_source
from masters.store import lineage
from masters.store.lineage import LineageNode
from masters.store.storage import Storage
from masters.tracking.client import redact_uri
from masters.tracking.locations import candidate_uris, check_exists
from masters.tracking.registry import LineageTarget, Registry

RUN_ID = re.compile(r"[0-9a-f]{32}")


def trace_lineage(reference: str, mlflow_uri: str | None = None) -> dict:
    """Return the lineage of a model or run, with every listed file verified: `verified`, `stages` and `faults`."""
    registry, target = find_target(reference, mlflow_uri)
    nodes = lineage.walk(Storage(target.store), target.folders, records=target.records)
    fingerprints = [_fingerprint(node) for node in nodes]
    run_ids = registry.run_ids(target.parent, fingerprints) if target.parent else dict.fromkeys(fingerprints)
    faults = [fault for node in nodes for fault in node.faults]
    return {
        "of": target.title,
        "mlflow": redact_uri(registry.uri),
        "store": target.store,
        "verified": not faults,
        "faults": faults,
        "stages": [_report_stage(node, nodes, run_ids) for node in nodes],
    }


def find_target(reference: str, mlflow_uri: str | None) -> tuple[Registry, LineageTarget]:
    """Resolve `name`, `models:/name/3`, `name@champion` or a run id. Returns its MLflow's registry and the target."""
    name, selector = parse_reference(reference)
    if selector is None and RUN_ID.fullmatch(name):
        return _find_run(name, mlflow_uri)
    registry = find_registry(name, mlflow_uri)
    return registry, registry.resolve_model(name, selector)


def _find_run(run_id: str, mlflow_uri: str | None) -> tuple[Registry, LineageTarget]:
    """Find a run in the MLflows of all stores that this machine knows. The error names those that do not answer."""
    uris, unreachable = candidate_uris(None, mlflow_uri), []
    for uri in uris:
        try:
            check_exists(uri)
            registry = Registry(uri)
        except InputError as error:
            if len(uris) == 1:
                raise
            unreachable.append(str(error))
            continue
        if target := registry.resolve_run(run_id):
            return registry, target
    raise InputError(
        f"run {run_id} was not found in an MLflow known to this machine; name its MLflow with --mlflow-uri"
        + "".join(f"; {reason}" for reason in unreachable)
    )


def find_registry(name: str, mlflow_uri: str | None = None) -> Registry:
    """Return the registry of the MLflow that has a registered model of this name."""
    if not name:
        raise InputError("expected the name of a registered model, found none")
    uris = candidate_uris(name, mlflow_uri)
    if not uris:
        raise InputError(f"no run of {name} was made on this machine: name its MLflow with --mlflow-uri")
    for uri in uris:
        check_exists(uri)  # a model of this name in a later one may be another
        registry = Registry(uri)
        if registry.has(name):
            return registry
    places = ", ".join(map(redact_uri, uris))
    raise InputError(f"no registered model {name} in MLflow at {places}; name another with --mlflow-uri")


def parse_reference(reference: str) -> tuple[str, str | None]:
    """Split a reference into the name and, if given, the version number or "@alias"."""
    name, separator, selector = reference.removeprefix("models:/").partition("/")
    if separator:
        return name, selector
    name, at, alias = name.partition("@")
    return name, f"@{alias}" if at else None


def _fingerprint(node: LineageNode) -> str:
    return (node.record or {}).get("fingerprint") or node.folder.rsplit("-", 1)[-1]


def _report_stage(node: LineageNode, nodes: list[LineageNode], run_ids: dict[str, str | None]) -> dict:
    record, fingerprint = node.record or {}, _fingerprint(node)
    return dict(
        name=record.get("stage") or node.folder.split("/")[0],
        fingerprint=fingerprint,
        uri=node.uri,
        digest=record.get("digest"),
        mlflow_run_id=run_ids[fingerprint],
        inputs=report_inputs(node, {other.folder: other.uri for other in nodes}),
        files=len(record.get("files", [])),
        verified=not node.faults,
    )


def report_inputs(node: LineageNode, uris: dict[str, str]) -> list[dict]:
    """Describe a stage's inputs, artifacts first. `uris` maps the folders of artifacts to their addresses."""
    artifacts = [
        dict(role=role, name=source["stage"], fingerprint=source["fingerprint"], uri=uris[source["folder"]])
        | dict(digest=source["digest"])
        for role, source in node.upstream.items()
        if source["kind"] == "artifact"
    ]
    fetch_images = bool((node.record or {}).get("facts", {}).get("fetch_images"))
    external = [
        dict(role=role, name=source["kind"], fingerprint=None, uri=source["uri"])
        | dict(digest=source["digest"], state=input_state(source, fetch_images))
        for role, source in lineage.external_inputs(node)
    ]
    return artifacts + external


def input_state(reference: dict, fetch_images: bool) -> str:
    """Compare an input from outside the store: "same", "changed since", "not here" or "not checked".

    `fetch_images`: the digest of a source covers the images that its rows name by URL. They are downloaded if they are
    not in this machine's cache.
    """
    digests: dict[str, Callable[[str], str]] = {
        "model": lambda folder: model_digest(Path(folder)),
        "source": lambda source: open_source(Data(source=source, fetch_images=fetch_images)).digest(),
    }
    kind, uri = reference["kind"], reference["uri"]
    if reference["digest"] is None or kind not in digests:
        return "not checked"
    if not Path(uri).exists() and uri not in BUILT_IN_SOURCES:
        return "not here"
    try:
        return "same" if digests[kind](uri) == reference["digest"] else "changed since"
    except (MastersError, OSError):
        return "changed since"
