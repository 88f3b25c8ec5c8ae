"""Data sets and tags that describe the lineage of a stage's output in its MLflow run.

`masters.tasks.build_or_reuse` has them written for every stage from the stage's upstream. The artifact's record holds
the same references, which `masters.store.lineage` walks.
"""

import re
import warnings
from collections.abc import Iterator

from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, InputTag

from masters import __version__
from masters.common.hashing import fingerprint
from masters.common.provenance import code_commit
from masters.config import Config
from masters.config.mask_schedule import mask_ratios
from masters.rewards import judge_prompts
from masters.store.artifacts import Artifact, External, Identity, Upstream, record_digest
from masters.tracking.registry import RECORD_TAG

MAX_DIGEST_LENGTH = 36  # MLflow's limit
MAX_KEY_LENGTH = 250  # MLflow's limit
UNREAD_TABLES = ("rejected", "judgements")  # for people: no stage reads them


def mlflow_key(text: str) -> str:
    """Convert `text` to a valid name of a metric or tag: "-" replaces characters that MLflow refuses.

    Users name models, for example `final(1)`, `models:/NAME@champion` or `../student`.
    """
    valid = re.sub(r"[^\w. :/-]", "-", text)
    segments = (re.sub(r"^\.+$", "-", segment) for segment in valid.split("/"))  # MLflow reads a name as a path
    path = "/".join(segment for segment in segments if segment)
    return path if len(path) <= MAX_KEY_LENGTH else f"{path[: MAX_KEY_LENGTH - 17].rstrip('/')}-{fingerprint(text)}"


def run_tags(config: Config) -> dict[str, str]:
    """Return tags of every run and model version: mask schedules, version of the judge's prompts, code."""
    schedules = [" ".join(f"{r:g}" for r in mask_ratios(t.r_max, t.mask_step)) for t in config.teachers]
    tags = {"masters.mask_schedule": "; ".join(schedules), "masters.code": __version__}
    if "llm" in (config.rewards.accuracy, config.evaluate.accuracy):
        tags["masters.judge_prompts"] = str(judge_prompts.VERSION)
    if commit := code_commit():
        tags["masters.commit"] = commit
    return tags


def stage_tags(identity: Identity, upstream: Upstream, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return tags of a stage's run. `known` maps the folders of this run's artifacts to their upstream fingerprints."""
    tags = {
        "masters.stage": identity.stage,
        "masters.fingerprint": identity.fingerprint,
        "masters.stage_version": str(identity.version),
    }
    return tags | {f"upstream.{name}": value for name, value in upstream_fingerprints(upstream, known).items()}


def upstream_fingerprints(upstream: Upstream, known: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return fingerprints (or digests) of everything upstream.

    The keys are stages for artifacts of this run, and roles for inputs from outside the store and for artifacts of
    earlier runs, such as the champion that a night's student starts from.
    """
    fingerprints: dict[str, str] = {}
    for role, source in upstream.items():
        if isinstance(source, External):
            fingerprints[role] = source.digest or source.uri
        elif source.folder in known:
            fingerprints |= known[source.folder] | {source.record["stage"]: source.fingerprint}
        else:
            fingerprints[role] = source.fingerprint
    return fingerprints


def input_datasets(upstream: Upstream) -> list[DatasetInput]:
    """Return a stage's inputs as MLflow data sets."""
    datasets = []
    for role, source in upstream.items():
        if isinstance(source, External):
            tags = {"role": role, "kind": source.kind}
            datasets.append(_dataset(role, source.uri, source.digest or "unknown", "input", tags))
        else:
            datasets += _artifact_datasets(source, "input", {"role": role})
    return datasets


def output_datasets(artifact: Artifact) -> list[DatasetInput]:
    """Return a stage's output as MLflow data sets, with the names and digests that its readers log."""
    return list(_artifact_datasets(artifact, "output", {}, with_unread=True))


def question_dataset(upstream: Upstream) -> dict[str, str]:
    """Return name and digest of the questions that a stage reads, as arguments of MLflow's Metric; empty if none."""
    data = upstream.get("data")
    if not isinstance(data, Artifact) or "questions" not in data.part_digests:
        return {}
    return dict(dataset_name="questions", dataset_digest=data.part_digests["questions"][:MAX_DIGEST_LENGTH])


def _artifact_datasets(
    artifact: Artifact, context: str, tags: dict[str, str], with_unread: bool = False
) -> Iterator[DatasetInput]:
    """Yield a data set for each part of an artifact. `with_unread` includes tables that no stage reads."""
    tags = tags | {"stage": artifact.record["stage"], "fingerprint": artifact.fingerprint}
    for part, digest in artifact.part_digests.items():
        if with_unread or part not in UNREAD_TABLES:
            yield _dataset(part, f"{artifact.uri}/{part}", digest, context, tags)


def _dataset(name: str, uri: str, digest: str, context: str, tags: dict[str, str]) -> DatasetInput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow has two equal kinds of local source and warns
        source = resolve_dataset_source(uri)
    dataset = MetaDataset(source, name=name, digest=digest[:MAX_DIGEST_LENGTH])
    all_tags = {"mlflow.data.context": context, "digest": digest} | tags
    return DatasetInput(
        Dataset(**dataset.to_dict()), [InputTag(mlflow_key, value) for mlflow_key, value in all_tags.items()]
    )


def artifact_tags(artifact: Artifact) -> dict[str, str]:
    """Return tags by which an artifact is found and verified."""
    return {
        "masters.uri": artifact.uri,
        "masters.folder": artifact.folder,
        "masters.fingerprint": artifact.fingerprint,
        "masters.digest": artifact.record["digest"],
        RECORD_TAG: record_digest(artifact.record),
        "masters.store": artifact.storage.uri(""),
    }
