"""The whole pipeline on one page: data, mask, generate, score, train, evaluate, register; a round a teacher."""

import json
from typing import Literal

from prefect import flow
from prefect.runtime import flow_run

from masters.config import Config
from masters.preflight import LocalModel, Ready, preflight
from masters.summary import Summary
from masters.tasks.data import data
from masters.tasks.evaluate import evaluate
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.register import register
from masters.tasks.score import score
from masters.tasks.stage import Run
from masters.tasks.train import train
from masters.tracking import Tracker

Stage = Literal["data", "mask", "generate", "score", "train", "evaluate", "register"]
STAGES: tuple[Stage, ...] = ("data", "mask", "generate", "score", "train", "evaluate", "register")


@flow(name="distill", flow_run_name="{config.name}")
def distill(config: Config, rebuild: list[Stage] | None = None, until: Stage = "register") -> dict:
    """Distil the student of a configuration; what is built already is reused. Returns the summary.

    `rebuild` names stages to build again, `until` the last stage to run.
    """
    ready = preflight(config)
    tracker = Tracker(config, ready.storage)
    run = Run(config, ready, tracker, frozenset(rebuild or []))
    summary = Summary(run, str(flow_run.id or ""))
    try:
        pipeline(run, summary, until)
    except BaseException as error:
        tracker.finish("FAILED")
        summary.write("failed", str(error))
        raise
    tracker.finish("FINISHED")
    return json.loads(summary.write("completed"))


def pipeline(run: Run, summary: Summary, until: Stage) -> None:
    """Every stage up to `until`, in order."""
    questions = data(run)
    if until == "data":
        return
    student, trained = run.ready.student, None
    for number, (teacher, model) in enumerate(zip(run.config.teachers, run.ready.teachers, strict=True), 1):
        models, suffix = (model, student), f"-{number}" if number > 1 else ""
        inputs = {"masks": mask(run, teacher, model, f"mask{suffix}"), "responses": None, "verdicts": None}
        if until == "mask":
            continue
        if "generate" in needs(run.config):
            inputs["responses"] = generate(run, questions, inputs["masks"], teacher, models, f"generate{suffix}")
        if "score" in needs(run.config) and until != "generate":
            inputs["verdicts"] = score(run, questions, inputs["responses"], f"score{suffix}")
        if until in ("generate", "score"):
            continue
        trained = train(run, questions, inputs, teacher, models, f"train{suffix}")
        student = LocalModel("student-after", run.fetched(trained), trained.record["digest"])
    if until in ("evaluate", "register") and trained:
        evaluated = evaluate(run, questions, [*run.ready.teachers, before(run.ready), student])
        summary.scores(evaluated, trained)
        if until == "register":
            summary.registered(register(run, trained, evaluated))


def needs(config: Config) -> tuple[Stage, ...]:
    """Which of generate and score the objective asks for."""
    if config.train.targets == "labels":
        return ()
    scored = config.train.objective == "masters" and config.rewards.accuracy != "off"
    return ("generate", "score") if scored else ("generate",)


def before(ready: Ready) -> LocalModel:
    """The student as it came, under its name in the predictions table."""
    return LocalModel("student-before", ready.student.folder, ready.student.digest)
