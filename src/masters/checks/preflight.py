"""Refuse, before work starts, what cannot work: store, source, models and whether they fit together."""

import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec

from masters.checks.model_folder import (
    LocalModel,
    JudgeServer,
    check_pair,
    check_context_length,
    disambiguate_names,
    find_model,
    read_special_tokens,
)
from masters.checks.weights import check_maskable
from masters.common.errors import InputError
from masters.common.machine import cache_folder
from masters.config import Config, Model
from masters.config.allowlist import check_config
from masters.config.fields import TEACHER
from masters.config.judge_url import api_base_url, is_url
from masters.data.sources import Source, open_source
from masters.store.artifacts import Artifact
from masters.store.storage import Storage, open_storage

RAY_TIMEOUT = 5.0  # for the head of a Ray cluster to answer


@dataclass(frozen=True)
class Resources:
    """A configuration whose parts were found and fit together."""

    storage: Storage
    source: Source
    student: LocalModel
    teachers: list[LocalModel]
    read_special_tokens: tuple[str, ...]  # of the tokenizer that all models share
    judge: LocalModel | JudgeServer | None = None  # None: no LLM judges, or each round's teacher does


def preflight(config: Config) -> Resources:
    """Check all parts together. Raises InputError with what was expected, what was found and what to do."""
    check_config(config)
    check_ray_cluster(config.runtime.cluster)
    check_packages(config)
    judge = find_judge(config)
    source = open_source(config.data)
    student = find_model(config.student, config.store.root)
    teachers = [find_model(teacher, config.store.root) for teacher in config.teachers]
    check_context_length(student, config)
    for teacher, wanted in zip(teachers, config.teachers, strict=True):
        check_pair(teacher, student)
        check_context_length(teacher, config)
        if wanted.r_max > 0:
            check_maskable(teacher.folder, tuple(config.mask.exclude))
    storage = open_storage(config.store.root)
    student, *teachers = disambiguate_names([student, *teachers])
    return Resources(storage, source, student, teachers, read_special_tokens(student.folder), judge)


def preflight_from_student(config: Config, trained: Artifact, name: str) -> Resources:
    """What preflight finds with a trained student as the student: lineage goes on into its train artifact."""
    folder = trained.storage.download(f"{trained.folder}/model", cache_folder() / "models" / trained.parts["model"][:32])
    resources = preflight(config.model_copy(update=dict(student=Model(model=str(folder)))))
    return replace(resources, student=replace(resources.student, name=name, artifact=trained))


def check_ray_cluster(cluster: str | None) -> None:
    """Raises InputError if nothing listens where a Ray cluster should. Ray itself is asked when engines are."""
    if cluster is None:
        return
    host, port = cluster.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), RAY_TIMEOUT):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(
            f"runtime.ray_address: no Ray cluster answers at {cluster} ({error}); "
            "start its head with `ray start --head`, or leave the setting out"
        ) from error


def check_packages(config: Config) -> None:
    """Raises InputError where a stage would need a package that is not here."""
    if config.answers.verifier == "number" and find_spec("math_verify") is None:
        raise InputError(
            'answers.verifier = "number" needs math-verify, which is not installed: install masters[number], or take '
            '"final"'
        )


def find_judge(config: Config) -> LocalModel | JudgeServer | None:
    """The judge that the configuration names, where it needs one beside the teachers."""
    rewards = config.rewards
    if not config.needs_judge or rewards.judge == TEACHER:
        return None
    if is_url(rewards.judge):
        return JudgeServer(api_base_url(rewards.judge), rewards.judge_model)
    try:
        return find_model(Model(model=rewards.judge), config.store.root)
    except InputError as error:
        raise InputError(f"rewards.judge: {error}") from error


def list_warnings(config: Config) -> list[str]:
    """What is allowed but was found to do harm."""
    return [
        f"teacher {t.model}: r_max = {t.r_max} is above 0.2; "
        "in the paper three of four teachers did worse at 0.3 than without masks"
        for t in config.teachers
        if t.r_max > 0.2
    ]
