"""The registered models in MLflow: versions, who is candidate and champion, who was, and what a version leads to."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from masters.common.errors import InputError
from masters.config.fields import NAME
from masters.store.artifacts import RECORD
from masters.store.storage import Storage
from masters.tracking.client import client as mlflow_client
from masters.tracking.client import point_mlflow_at, redact_uri

CANDIDATE, CHAMPION = "candidate", "champion"
CHAMPIONS = "masters.champions"  # a registered model's tag: JSON list of versions, the first champion first
RECORD_TAG = "masters.record"  # a digest over what an artifact's record holds
# a version's tags
VERDICT, TOLD, LEFT, SINCE = "masters.gate", "masters.told", "masters.rolled_back", "masters.champion_since"
KEPT = 50


@dataclass(frozen=True)
class Target:
    """A registered version or a run, and the artifacts it stands for: `folders` of `store` to the digest expected."""

    title: str
    store: str
    folders: dict[str, str]
    parent: str | None  # the run of the whole distillation
    records: dict[str, str] = field(default_factory=dict)  # by folder: what its record is expected to hold, a digest


class Registry:
    """The models of one MLflow. Names and versions that are not there are InputErrors."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        point_mlflow_at(uri)
        self._client = mlflow_client(uri)

    def has(self, name: str) -> bool:
        return self._model(name) is not None

    def _model(self, name: str) -> RegisteredModel | None:
        """None if MLflow says that there is none. Asked by a search: an MLflow that is away is no missing model."""
        if not re.fullmatch(NAME, name):
            return None  # no configuration's name, and none that a query could hold
        found = self._client.search_registered_models(f"name = '{name}'")
        return found[0] if found else None

    def versions(self, name: str) -> list[ModelVersion]:
        """All of them, the newest first."""
        found = self._client.search_model_versions(f"name = '{name}'", max_results=10_000)
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def version(self, name: str, number: int) -> ModelVersion:
        versions = self.versions(name) if self.has(name) else []
        for version in versions:
            if int(version.version) == number:
                return version
        there = ", ".join(str(v.version) for v in reversed(versions)) or "none"
        raise InputError(f"model {name} has no version {number}; there: {there}")

    def aliased(self, name: str, alias: str) -> int | None:
        """The version that an alias stands for; None if no version of that model has it."""
        model = self._model(name)
        number = model.aliases.get(alias) if model else None
        return None if number is None else int(number)

    def champion(self, name: str) -> int | None:
        return self.aliased(name, CHAMPION)

    def candidate(self, name: str) -> int | None:
        return self.aliased(name, CANDIDATE)

    def history(self, name: str) -> list[int]:
        """Versions that were champion, in order; one that was rolled back stays until the next is promoted."""
        model = self._model(name)
        if model is None:
            raise InputError(f"there is no registered model {name} in MLflow at {redact_uri(self.uri)}")
        return [int(version) for version in json.loads(model.tags.get(CHAMPIONS, "[]"))]

    def last_champion(self, name: str) -> int | None:
        """The version that had the alias champion last; one to which it was on its way when a night died had not."""
        since = {int(version.version) for version in self.versions(name) if SINCE in version.tags}
        return next((number for number in reversed(self.history(name)) if number in since), None)

    def previous(self, name: str) -> int | None:
        """The version that was champion before today's."""
        before = self._until_champion(name)[:-1]
        return before[-1] if before else None

    def promote(self, name: str, version: int) -> None:
        """Make a version the champion. Cut short anywhere, doing it again ends the same."""
        if SINCE in self.version(name, version).tags and self.champion(name) == version:
            return
        chain = [*self._until_champion(name), version][-KEPT:]
        # history first: an alias that is not in it could not be rolled back to
        self._client.set_registered_model_tag(name, CHAMPIONS, json.dumps(chain))
        self._client.set_registered_model_alias(name, CHAMPION, str(version))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._client.set_model_version_tag(name, str(version), SINCE, now)

    def judged(self, name: str, version: int, verdict: str) -> None:
        """Note the gate's verdict on a version, which is the candidate from now on."""
        self._client.set_registered_model_alias(name, CANDIDATE, str(version))
        self._client.set_model_version_tag(name, str(version), VERDICT, verdict[:500])

    def is_judged(self, name: str, version: int) -> bool:
        """Whether a night came to a verdict on it."""
        return VERDICT in self.version(name, version).tags

    def told(self, name: str, version: int) -> str:
        """The regression of a version that a person has been told of, as `tell` noted it; else empty."""
        return self.version(name, version).tags.get(TOLD, "")

    def tell(self, name: str, version: int, regression: str) -> None:
        self._client.set_model_version_tag(name, str(version), TOLD, regression)

    def rolled_back(self, name: str, version: int) -> bool:
        """Whether a person took the alias champion from it, and nobody has given it back."""
        return LEFT in self.version(name, version).tags

    def rollback(self, name: str, to: int | None = None) -> tuple[int | None, int]:
        """Give the alias to an earlier champion, by default the one before. Returns (from, to).

        The version that is left stays candidate at most: no night promotes it, until a person does, by `to`.
        """
        history, current = self.history(name), self.champion(name)
        if current is None and to is None:
            raise InputError(f"model {name} has no champion to roll back; name a version with --to")
        target = to if to is not None else self.previous(name)
        if target is None:
            raise InputError(f"model {name}: no version was champion before version {current}; name one with --to")
        if target == current:
            raise InputError(f"model {name}: version {target} is the champion already")
        version = self.version(name, target)
        self._check_there(version)
        if current is not None:  # before the alias: a night in between must not undo it
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._client.set_model_version_tag(name, str(current), LEFT, now)
        if LEFT in version.tags:
            self._client.delete_model_version_tag(name, str(target), LEFT)
        if target in history:
            self._client.set_registered_model_alias(name, CHAMPION, str(target))
        else:
            self.promote(name, target)
        return current, target

    def chosen(self, name: str, selector: str | None = None) -> ModelVersion:
        """A version by number or by "@alias"; without either champion, else candidate, else the newest."""
        if selector and not selector.startswith("@"):
            if not selector.isascii() or not selector.isdigit():
                raise InputError(f"model {name}: expected a version's number or @alias, found {selector!r}")
            return self.version(name, int(selector))
        if selector:
            number = self.aliased(name, selector[1:])
            if number is None:
                raise InputError(f"model {name} has no version with the alias {selector[1:]!r}")
            return self.version(name, number)
        number = self.champion(name) or self.candidate(name)
        if number is None and not (found := self.versions(name)):
            raise InputError(f"model {name} has no version yet")
        return self.version(name, number or int(found[0].version))

    def target_of_model(self, name: str, selector: str | None = None) -> Target:
        version = self.chosen(name, selector)
        title = f"models:/{name}/{version.version}"
        tags = version.tags
        if "masters.store" not in tags:
            raise InputError(f"{title} was not registered by this version of masters: it does not say where it lies")
        folder = tags["masters.folder"]
        records = {folder: tags[RECORD_TAG]} if RECORD_TAG in tags else {}
        return Target(title, tags["masters.store"], {folder: tags["masters.digest"]}, tags["masters.run_id"], records)

    def target_of_run(self, run_id: str) -> Target | None:
        """Of a stage's run its artifact, of a distillation's run those of its stages; None if it is not known here."""
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            return None
        parent = run.data.tags.get("mlflow.parentRunId")
        stages = [run] if parent else self.stages(run.info.experiment_id, run_id)
        made = [
            stage.data.tags
            for stage in sorted(stages, key=lambda stage: stage.info.start_time)
            if "masters.folder" in stage.data.tags
        ]
        if not made:
            raise InputError(f"run {run_id} finished no stage of a distillation")
        folders = {tags["masters.folder"]: tags["masters.digest"] for tags in made}
        records = {tags["masters.folder"]: tags[RECORD_TAG] for tags in made if RECORD_TAG in tags}
        return Target(f"run {run_id}", run.data.tags["masters.store"], folders, parent or run_id, records)

    def stages(self, experiment: str, parent: str) -> list:
        """The runs of a distillation's stages."""
        return list(self._client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=1000))

    def run_ids(self, parent: str, fingerprints: Iterable[str]) -> dict[str, str | None]:
        """By fingerprint the run of a stage: this distillation's, else that which built what it took over."""
        experiment = self._client.get_run(parent).info.experiment_id
        own = {run.data.tags["masters.fingerprint"]: run.info.run_id for run in self.stages(experiment, parent)}
        return {made: own.get(made) or self.built(experiment, made) for made in fingerprints}

    def built(self, experiment: str, fingerprint: str) -> str | None:
        """The run that built an artifact of this experiment, whichever distillation it belonged to."""
        query = f"tags.`masters.fingerprint` = '{fingerprint}' and tags.`masters.outcome` = 'built'"
        found = self._client.search_runs([experiment], query, max_results=1)
        return found[0].info.run_id if found else None

    def wanted(self) -> set[tuple[str, str, str]]:
        """URI, folder in its store and digest of the versions that some alias stands for, or `rollback` leads to."""
        found, tags = set(), ("masters.uri", "masters.folder", "masters.digest")
        for model in self._models():
            numbers = {int(version) for version in model.aliases.values()}
            if before := self.previous(model.name):
                numbers.add(before)
            versions = (version for version in self.versions(model.name) if int(version.version) in numbers)
            found |= {tuple(version.tags.get(tag, "") for tag in tags) for version in versions}
        return found

    def made_from(self, fingerprint: str) -> list[str]:
        """The versions with an alias that an artifact led to, as `models:/NAME/VERSION (ALIASES)`."""
        found = []
        for model in self._models():
            for number in sorted({int(version) for version in model.aliases.values()}):
                tags = self.version(model.name, number).tags
                made = {value for key, value in tags.items() if key.startswith("upstream.")}
                if fingerprint in made | {tags.get("masters.fingerprint")}:
                    names = sorted(alias for alias, version in model.aliases.items() if int(version) == number)
                    found.append(f"models:/{model.name}/{number} ({', '.join(names)})")
        return found

    def _models(self) -> Iterator[RegisteredModel]:
        """All of them. By this client: MLflow's own function for it asks whichever MLflow was named last."""
        token = ""
        while token is not None:
            page = self._client.search_registered_models(page_token=token or None)
            yield from (model for model in page if re.fullmatch(NAME, model.name))  # others are nobody's of ours
            token = page.token or None

    def _until_champion(self, name: str) -> list[int]:
        """The history up to today's champion, with it: what was rolled back is left out."""
        history, current = self.history(name), self.champion(name)
        if current is None:
            return []
        if current not in history:  # somebody set the alias by hand
            return [*history, current]
        return history[: len(history) - history[::-1].index(current)]

    def _check_there(self, version: ModelVersion) -> None:
        tags = version.tags
        if "masters.store" not in tags:
            return
        if not Storage(tags["masters.store"]).exists(f"{tags['masters.folder']}/{RECORD}"):
            raise InputError(
                f"model {version.name}: version {version.version} is no longer in its store "
                f"({tags['masters.uri']}): it cannot be champion"
            )
