"""The registered models in MLflow: versions, candidate and champion, rollback, and the artifacts behind a version."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from masters.common.errors import InputError
from masters.config.fields import NAME_PATTERN
from masters.store.artifacts import RECORD
from masters.store.storage import Storage
from masters.tracking.client import client as mlflow_client
from masters.tracking.client import point_mlflow_at, redact_uri

CANDIDATE, CHAMPION = "candidate", "champion"
RECORD_TAG = "masters.record"  # digest of an artifact's record
# tag of a registered model
CHAMPIONS = "masters.champions"  # JSON list of the versions that were champion, the first one first
MAX_CHAMPIONS = 50
# tags of a model version
VERDICT = "masters.gate"  # the promotion gate's verdict
REGRESSION = "masters.told"  # the regression that the webhook has reported
ROLLED_BACK = "masters.rolled_back"  # time of the rollback that took the alias champion away
CHAMPION_SINCE = "masters.champion_since"  # time of the promotion


@dataclass(frozen=True)
class LineageTarget:
    """A model version or a run, and its artifacts in `store`."""

    title: str
    store: str
    folders: dict[str, str]  # folder to the expected digest of its files
    parent: str | None  # the run of the whole distillation
    records: dict[str, str] = field(default_factory=dict)  # folder to the expected digest of its record


class Registry:
    """The registered models of one MLflow. Unknown names and versions raise InputError."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        point_mlflow_at(uri)
        self._client = mlflow_client(uri)

    def has(self, name: str) -> bool:
        """Return whether there is a registered model of this name."""
        return self._model(name) is not None

    def _model(self, name: str) -> RegisteredModel | None:
        """Return a model, None if there is none. A search, unlike a get, fails only if MLflow does not answer."""
        if not re.fullmatch(NAME_PATTERN, name):
            return None  # not a name that a configuration can have, nor one that a query can hold
        found = self._client.search_registered_models(f"name = '{name}'")
        return found[0] if found else None

    def versions(self, name: str) -> list[ModelVersion]:
        """Return all versions, the newest first."""
        found = self._client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def version(self, name: str, number: int) -> ModelVersion:
        """Return the version with this number."""
        versions = self.versions(name) if self.has(name) else []
        for version in versions:
            if int(version.version) == number:
                return version
        existing = ", ".join(str(v.version) for v in reversed(versions)) or "none"
        raise InputError(f"model {name} has no version {number}; existing versions: {existing}")

    def version_of_alias(self, name: str, alias: str) -> int | None:
        """Return the number of the version with this alias; None if there is none."""
        model = self._model(name)
        number = model.aliases.get(alias) if model else None
        return None if number is None else int(number)

    def champion(self, name: str) -> int | None:
        """Return the number of the champion; None if there is none."""
        return self.version_of_alias(name, CHAMPION)

    def candidate(self, name: str) -> int | None:
        """Return the number of the candidate; None if there is none."""
        return self.version_of_alias(name, CANDIDATE)

    def champion_history(self, name: str) -> list[int]:
        """Return the versions that were champion, in order. A version rolled back stays until the next promotion."""
        model = self._model(name)
        if model is None:
            raise InputError(f"there is no registered model {name} in MLflow at {redact_uri(self.uri)}")
        return [int(version) for version in json.loads(model.tags.get(CHAMPIONS, "[]"))]

    def last_champion(self, name: str) -> int | None:
        """Return the last version that had the alias champion, without promotions that were interrupted."""
        promoted = {int(version.version) for version in self.versions(name) if CHAMPION_SINCE in version.tags}
        return next((number for number in reversed(self.champion_history(name)) if number in promoted), None)

    def previous_champion(self, name: str) -> int | None:
        """Return the version that was champion before the present one."""
        earlier = self._history_to_champion(name)[:-1]
        return earlier[-1] if earlier else None

    def promote(self, name: str, version: int) -> None:
        """Make a version the champion. A repetition after an interruption gives the same result."""
        if CHAMPION_SINCE in self.version(name, version).tags and self.champion(name) == version:
            return
        history = self._history_to_champion(name)
        if history[-1:] != [version]:  # an interrupted promotion has added it already
            history = [*history, version][-MAX_CHAMPIONS:]
        # the history first: `_history_to_champion` ignores its new entry until the alias moves
        self._client.set_registered_model_tag(name, CHAMPIONS, json.dumps(history))
        self._client.set_registered_model_alias(name, CHAMPION, str(version))
        self._client.set_model_version_tag(name, str(version), CHAMPION_SINCE, _now())

    def record_verdict(self, name: str, version: int, verdict: str) -> None:
        """Make a version the candidate and record the promotion gate's verdict on it."""
        self._client.set_registered_model_alias(name, CANDIDATE, str(version))
        self._client.set_model_version_tag(name, str(version), VERDICT, verdict[:500])

    def has_verdict(self, name: str, version: int) -> bool:
        """Return whether the promotion gate has judged a version."""
        return VERDICT in self.version(name, version).tags

    def reported_regression(self, name: str, version: int) -> str:
        """Return the regression of a version that has been reported; empty if there is none."""
        return self.version(name, version).tags.get(REGRESSION, "")

    def record_reported_regression(self, name: str, version: int, regression: str) -> None:
        """Record that the regression of a version has been reported."""
        self._client.set_model_version_tag(name, str(version), REGRESSION, regression)

    def was_rolled_back(self, name: str, version: int) -> bool:
        """Return whether a version lost the alias champion in a rollback and has not got it back."""
        return ROLLED_BACK in self.version(name, version).tags

    def rollback(self, name: str, to: int | None = None) -> tuple[int | None, int]:
        """Give the alias champion to an earlier version, by default the previous champion. Returns (from, to).

        `nightly` does not promote the version that lost the alias again; only a rollback `to` it does.
        """
        history, current = self.champion_history(name), self.champion(name)
        if current is None and to is None:
            raise InputError(f"model {name} has no champion to roll back; name a version with --to")
        target = to if to is not None else self.previous_champion(name)
        if target is None:
            raise InputError(f"model {name}: no version was champion before version {current}; name one with --to")
        if target == current:
            raise InputError(f"model {name}: version {target} is the champion already")
        version = self.version(name, target)
        self._check_artifact_exists(version)
        if current is not None:  # before the alias, so that no night in between promotes it again
            self._client.set_model_version_tag(name, str(current), ROLLED_BACK, _now())
        if ROLLED_BACK in version.tags:
            self._client.delete_model_version_tag(name, str(target), ROLLED_BACK)
        if target in history:
            self._client.set_registered_model_alias(name, CHAMPION, str(target))
        else:
            self.promote(name, target)
        return current, target

    def select_version(self, name: str, selector: str | None = None) -> ModelVersion:
        """Return a version by number or "@alias"; without a selector the champion, else candidate, else newest."""
        if selector and not selector.startswith("@"):
            if not selector.isascii() or not selector.isdigit():
                raise InputError(f"model {name}: expected a version's number or @alias, found {selector!r}")
            return self.version(name, int(selector))
        if selector:
            number = self.version_of_alias(name, selector[1:])
            if number is None:
                raise InputError(f"model {name} has no version with the alias {selector[1:]!r}")
            return self.version(name, number)
        number = self.champion(name) or self.candidate(name)
        if number is None and not (found := self.versions(name)):
            raise InputError(f"model {name} has no version yet: `masters distill` registers one")
        return self.version(name, number or int(found[0].version))

    def resolve_model(self, name: str, selector: str | None = None) -> LineageTarget:
        """Return the artifact of a version, selected as in `select_version`."""
        version = self.select_version(name, selector)
        title = f"models:/{name}/{version.version}"
        tags = version.tags
        if "masters.store" not in tags:
            raise InputError(f"{title} has no tag masters.store: it was not registered by this version of masters")
        folder = tags["masters.folder"]
        records = {folder: tags[RECORD_TAG]} if RECORD_TAG in tags else {}
        folders = {folder: tags["masters.digest"]}
        return LineageTarget(title, tags["masters.store"], folders, tags["masters.run_id"], records)

    def resolve_run(self, run_id: str) -> LineageTarget | None:
        """Return the artifact of a stage's run, or those of a distillation's stages; None if the run is unknown."""
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        parent = run.data.tags.get("mlflow.parentRunId")
        stages = [run] if parent else self.stage_runs(run.info.experiment_id, run_id)
        finished = [
            stage.data.tags
            for stage in sorted(stages, key=lambda stage: stage.info.start_time)
            if "masters.folder" in stage.data.tags
        ]
        if not finished:
            raise InputError(f"run {run_id} finished no stage of a distillation: name a run that did, or a model")
        folders = {tags["masters.folder"]: tags["masters.digest"] for tags in finished}
        records = {tags["masters.folder"]: tags[RECORD_TAG] for tags in finished if RECORD_TAG in tags}
        return LineageTarget(f"run {run_id}", run.data.tags["masters.store"], folders, parent or run_id, records)

    def stage_runs(self, experiment: str, parent: str) -> list[Run]:
        """Return the runs of a distillation's stages."""
        return list(self._client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1000))

    def run_ids(self, parent: str, fingerprints: Iterable[str]) -> dict[str, str | None]:
        """Map fingerprints to the runs of this distillation's stages, else to the runs that built the artifacts."""
        experiment = self._client.get_run(parent).info.experiment_id
        runs = self.stage_runs(experiment, parent)
        run_ids = {run.data.tags["masters.fingerprint"]: run.info.run_id for run in runs}
        return {key: run_ids.get(key) or self.find_building_run(experiment, key) for key in fingerprints}

    def find_building_run(self, experiment: str, fingerprint: str) -> str | None:
        """Return the run in this experiment that built an artifact, whichever distillation it belongs to."""
        query = f"tags.`masters.fingerprint` = '{fingerprint}' and tags.`masters.outcome` = 'built'"
        found = self._client.search_runs([experiment], query, max_results=1)
        return found[0].info.run_id if found else None

    def protected_artifacts(self) -> set[tuple[str, str, str]]:
        """Return (URI, folder, digest) of each version that has an alias or that `rollback` would choose."""
        found, tags = set(), ("masters.uri", "masters.folder", "masters.digest")
        for model in self._models():
            numbers = {int(version) for version in model.aliases.values()}
            if previous := self.previous_champion(model.name):
                numbers.add(previous)
            versions = (version for version in self.versions(model.name) if int(version.version) in numbers)
            found |= {tuple(version.tags.get(tag, "") for tag in tags) for version in versions}
        return found

    def versions_made_from(self, fingerprint: str) -> list[str]:
        """Return the versions with an alias that have an artifact upstream, as `models:/NAME/VERSION (ALIASES)`."""
        found = []
        for model in self._models():
            for number in sorted({int(version) for version in model.aliases.values()}):
                tags = self.version(model.name, number).tags
                upstream = {value for key, value in tags.items() if key.startswith("upstream.")}
                if fingerprint in upstream | {tags.get("masters.fingerprint")}:
                    names = sorted(alias for alias, version in model.aliases.items() if int(version) == number)
                    found.append(f"models:/{model.name}/{number} ({', '.join(names)})")
        return found

    def _models(self) -> Iterator[RegisteredModel]:
        """Yield all models that a configuration can name. MLflow's own function uses the address that was set last."""
        token = ""
        while token is not None:
            page = self._client.search_registered_models(page_token=token or None)
            yield from (model for model in page if re.fullmatch(NAME_PATTERN, model.name))
            token = page.token or None

    def _history_to_champion(self, name: str) -> list[int]:
        """Return the history up to and including the present champion, without versions that were rolled back."""
        history, current = self.champion_history(name), self.champion(name)
        if current is None:
            return []
        if current not in history:  # somebody set the alias by hand
            return [*history, current]
        return history[: len(history) - history[::-1].index(current)]

    def _check_artifact_exists(self, version: ModelVersion) -> None:
        """Raise InputError if the version's artifact is not in its store."""
        tags = version.tags
        if "masters.store" not in tags:
            return
        if not Storage(tags["masters.store"]).exists(f"{tags['masters.folder']}/{RECORD}"):
            raise InputError(
                f"model {version.name}: version {version.version} is no longer in its store "
                f"({tags['masters.uri']}), so it cannot be champion: name another version with --to"
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
