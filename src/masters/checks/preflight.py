"""Preflight: check store, source, models and judge, alone and in combination, before work starts."""

import socket
from dataclasses import dataclass, replace
from importlib.util import find_spec

from masters.checks.local_judge import check_judge_prompt
from masters.checks.model_folder import (
    JudgeServer,
    LocalModel,
    check_context_length,
    check_pair,
    disambiguate_names,
    download_student,
    find_model,
    read_special_tokens,
)
from masters.checks.weights import check_maskable
from masters.common.errors import InputError, one_line
from masters.config import Config, Model
from masters.config.allowlist import check_config
from masters.config.fields import TEACHER
from masters.config.judge_url import api_base_url, is_url
from masters.data.sources import Source, open_source
from masters.store.artifacts import Artifact
from masters.store.storage import Storage, open_storage

RAY_TIMEOUT = 5.0  # seconds for the head of a Ray cluster to accept a connection


@dataclass(frozen=True)
class Resources:
    """The opened storage, source and models of a configuration, checked alone and together."""

    storage: Storage
    source: Source
    student: LocalModel
    teachers: list[LocalModel]
    special_tokens: tuple[str, ...]  # of the tokenizer that all models share
    judge: LocalModel | JudgeServer | None = None  # None: no judge model, or each round's teacher judges


def preflight(config: Config) -> Resources:
    """Check a configuration before work starts and open its resources.

    Raises InputError with what was expected, what was found and what to do.
    """
    check_config(config)
    check_ray_cluster(config.runtime.cluster)
    check_packages(config)
    judge = find_judge(config)
    source = open_source(config.data)
    student = find_model(config.student, config.store.root, must_be_supported=True)
    teachers = [find_model(teacher, config.store.root, must_be_supported=True) for teacher in config.teachers]
    check_context_length(student, config)
    for teacher, teacher_config in zip(teachers, config.teachers, strict=True):
        check_pair(teacher, student)
        check_context_length(teacher, config)
        if teacher_config.r_max > 0:
            check_maskable(teacher.folder, tuple(config.mask.exclude))
    if config.needs_judge and not isinstance(judge, JudgeServer):
        for model in [judge] if judge else teachers:
            check_judge_prompt(model, config)
    storage = open_storage(config.store.root)
    student, *teachers = disambiguate_names([student, *teachers])
    return Resources(storage, source, student, teachers, read_special_tokens(student.folder), judge)


def shortest_context_length(config: Config, resources: Resources) -> int:
    """Return the most tokens, prompt and response together, that the engines of student and teachers all take."""
    outputs = [model.processor_output for model in (resources.student, *resources.teachers)]
    return min(config.runtime.context_length(output.positions) for output in outputs if output)


def preflight_from_student(config: Config, trained: Artifact, name: str) -> Resources:
    """Run preflight with a trained student in place of the configuration's. Its lineage includes `trained`."""
    student = Model(model=str(download_student(trained)))
    resources = preflight(config.model_copy(update=dict(student=student)))
    return replace(resources, student=replace(resources.student, name=name, artifact=trained))


def check_ray_cluster(cluster: str | None) -> None:
    """Raise InputError if nothing listens at the address of a Ray cluster. Ray itself is used when engines start."""
    if cluster is None:
        return
    host, port = cluster.rsplit(":", 1)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), RAY_TIMEOUT):
            pass
    except (OSError, OverflowError) as error:
        raise InputError(
            f"runtime.ray_address: no Ray cluster answers at {cluster} ({one_line(error)}); "
            "start its head with `ray start --head`, or remove the setting"
        ) from error


def check_packages(config: Config) -> None:
    """Raise InputError if a stage needs a package that is not installed."""
    if config.answers.verifier == "number" and find_spec("math_verify") is None:
        raise InputError(
            'answers.verifier = "number" needs math-verify, which is not installed: install masters[number], or use '
            'answers.verifier = "final"'
        )


def find_judge(config: Config) -> LocalModel | JudgeServer | None:
    """Return the judge in the configuration; None if no judge is needed or the teachers judge."""
    rewards = config.rewards
    if not config.needs_judge or rewards.judge == TEACHER:
        return None
    if is_url(rewards.judge):
        return JudgeServer(api_base_url(rewards.judge), rewards.judge_model)
    try:
        return find_model(Model(model=rewards.judge), config.store.root)
    except InputError as error:
        raise InputError(f"rewards.judge: {error}") from error


def list_warnings(config: Config, student: LocalModel) -> list[str]:
    """Return warnings about settings and models that are allowed but are known to do harm."""
    warnings = [
        f"teacher {teacher.model}: r_max = {teacher.r_max} is above 0.2; "
        "in the paper, three of four teachers did worse at 0.3 than without masks"
        for teacher in config.teachers
        if teacher.r_max > 0.2
    ]
    # teachers have the student's prompts, as `check_pair` requires
    if student.processor_output and (mark := student.processor_output.opened_thought):
        warnings.append(
            f"the chat template of {student.name} opens a thought: prompts end inside {mark}. Responses begin with the "
            f"thought, and generate.max_tokens ({config.generate.max_tokens}) may cut them off before the answer; use "
            "the variant of the models that does not think, or a chat template that opens no thought"
        )
    return warnings
