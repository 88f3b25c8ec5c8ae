"""What a stage's MLflow run says about where its output came from: data sets read and written, and tags.

`masters.tasks.build` has it written for every stage, from what the stage names as its upstream; a stage that
names none cannot be written down. The same goes into the artifact's record, which `masters.store.lineage` walks.
"""

import re
import warnings
from collections.abc import Iterator

from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Dataset, DatasetInput, InputTag

from masters import __version__
from masters.common.hashing import fingerprint
from masters.common.provenance import commit
from masters.config import Config
from masters.config.mask_schedule import mask_stages
from masters.rewards import judge_prompts
from masters.store.artifacts import Artifact, External, Identity, Upstream, record_digest
from masters.tracking.registry import RECORD_TAG

DIGEST_LENGTH = 36  # MLflow keeps no more
KEY_LENGTH = 250
ASIDE = ("rejected", "judgements")  # tables for people: no stage reads them


def key(text: str) -> str:
    """`text` as the name of a metric or a tag: of what MLflow refuses a "-" remains.

    Models are named by people: `final(1)`, `models:/NAME@champion`, `../student`.
    """
    kept = re.sub(r"[^\w. :/-]", "-", text)
    segments = (re.sub(r"^\.+$", "-", segment) for segment in kept.split("/"))  # it reads a name as a path
    path = "/".join(segment for segment in segments if segment)
    return path if len(path) <= KEY_LENGTH else f"{path[: KEY_LENGTH - 17].rstrip('/')}-{fingerprint(text)}"


def run_tags(config: Config) -> dict[str, str]:
    """Tags of every run and version: mask schedules, prompts of the judge, code."""
    schedules = [" ".join(f"{r:g}" for r in mask_stages(t.r_max, t.mask_step)) for t in config.teachers]
    tags = {"masters.mask_schedule": "; ".join(schedules), "masters.code": __version__}
    if "llm" in (config.rewards.accuracy, config.evaluate.accuracy):
        tags["masters.judge_prompts"] = str(judge_prompts.VERSION)
    if found := commit():
        tags["masters.commit"] = found
    return tags


def stage_tags(identity: Identity, upstream: Upstream, reached: dict[str, dict[str, str]]) -> dict[str, str]:
    """Tags of a stage's run. `reached`: by an artifact's folder, the fingerprints of everything behind it."""
    tags = {
        "masters.stage": identity.stage,
        "masters.fingerprint": identity.fingerprint,
        "masters.stage_version": str(identity.version),
    }
    return tags | {f"upstream.{name}": value for name, value in upstream_fingerprints(upstream, reached).items()}


def upstream_fingerprints(upstream: Upstream, reached: dict[str, dict[str, str]]) -> dict[str, str]:
    """Everything that led here, its fingerprint or digest by stage; by role what this run did not make: what lies
    outside the store, and what an earlier run left there, such as the champion that a night's student starts from.
    """
    found: dict[str, str] = {}
    for role, made in upstream.items():
        if isinstance(made, External):
            found[role] = made.digest or made.uri
        elif made.folder in reached:
            found |= reached[made.folder] | {made.record["stage"]: made.fingerprint}
        else:
            found[role] = made.fingerprint
    return found


def inputs(upstream: Upstream) -> list[DatasetInput]:
    """What a stage reads, as MLflow's data sets."""
    found = []
    for role, made in upstream.items():
        if isinstance(made, External):
            tags = {"role": role, "kind": made.kind}
            found.append(_used(role, made.uri, made.digest or "unknown", "input", tags))
        else:
            found += _parts(made, "input", {"role": role})
    return found


def outputs(artifact: Artifact) -> list[DatasetInput]:
    """What a stage wrote, as MLflow's data sets: the same name and digest as where it is read."""
    return list(_parts(artifact, "output", {}, aside=True))


def questions(upstream: Upstream) -> dict[str, str]:
    """Name and digest, as MLflow's metrics take them, of the questions that a stage reads; empty if it reads none."""
    data = upstream.get("data")
    if not isinstance(data, Artifact) or "questions" not in data.parts:
        return {}
    return dict(dataset_name="questions", dataset_digest=data.parts["questions"][:DIGEST_LENGTH])


def _parts(artifact: Artifact, context: str, tags: dict[str, str], aside: bool = False) -> Iterator[DatasetInput]:
    described = tags | {"stage": artifact.record["stage"], "fingerprint": artifact.fingerprint}
    for part, digest in artifact.parts.items():
        if aside or part not in ASIDE:
            yield _used(part, f"{artifact.uri}/{part}", digest, context, described)


def _used(name: str, uri: str, digest: str, context: str, tags: dict[str, str]) -> DatasetInput:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two kinds of local source that are one
        source = resolve_dataset_source(uri)
    described = MetaDataset(source, name=name, digest=digest[:DIGEST_LENGTH])
    all_tags = {"mlflow.data.context": context, "digest": digest} | tags
    return DatasetInput(Dataset(**described.to_dict()), [InputTag(key, value) for key, value in all_tags.items()])


def artifact_tags(artifact: Artifact) -> dict[str, str]:
    """Tags by which an artifact is found and proven."""
    return {
        "masters.uri": artifact.uri,
        "masters.folder": artifact.folder,
        "masters.fingerprint": artifact.fingerprint,
        "masters.digest": artifact.record["digest"],
        RECORD_TAG: record_digest(artifact.record),
        "masters.store": artifact.storage.uri(""),
    }
