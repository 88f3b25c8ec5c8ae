"""The whole pipeline on one page: data, mask, generate, score, train, evaluate, register; a round a teacher."""

import json
from contextlib import suppress

from prefect import flow
from prefect.runtime import flow_run

from masters.config import Config
from masters.errors import StoreError
from masters.preflight import LocalModel, preflight
from masters.stages import Stage
from masters.summary import Summary
from masters.tasks.data import data
from masters.tasks.evaluate import ahead, before, evaluate
from masters.tasks.generate import generate
from masters.tasks.mask import mask
from masters.tasks.register import register
from masters.tasks.score import score
from masters.tasks.stage import Round, Run
from masters.tasks.train import train
from masters.tracking import Tracker


@flow(name="distill", flow_run_name="{config.name}")
def distill(config: Config, rebuild: list[Stage] | None = None, until: Stage = Stage.REGISTER) -> dict:
    """Distil the student of a configuration; what is built already is reused. Returns the summary.

    Args:
        config: What a TOML file holds; what this form accepts is what the file accepts.
        rebuild: Stages to build again, in every round.
        until: The last stage to run.
    """
    ready = preflight(config)
    tracker = Tracker(config, ready.storage)
    run = Run(config, ready, tracker, frozenset(rebuild or []))
    summary = Summary(run, str(flow_run.id or ""))
    try:
        pipeline(run, summary, until)
    except BaseException as error:
        tracker.finish("FAILED")
        with suppress(StoreError):  # the error tells more than that its summary cannot be kept either
            summary.write("failed", str(error))
        raise
    tracker.finish("FINISHED")
    return json.loads(summary.write("completed"))


def pipeline(run: Run, summary: Summary, until: Stage) -> None:
    """Every stage up to `until`, in order."""
    questions = data(run)
    if until == Stage.DATA:
        return
    student = run.ready.student
    for number, (teacher, model) in enumerate(zip(run.config.teachers, run.ready.teachers, strict=True), 1):
        current = Round(number, teacher, model, student)
        inputs = {"data": questions, "masks": mask(run, current)}
        if until == Stage.MASK:
            continue
        if Stage.GENERATE in needs(run.config):
            later = ahead(run, current, questions) if until in (Stage.EVALUATE, Stage.REGISTER) else []
            inputs["responses"] = generate(run, current, questions, inputs["masks"], later)
        if Stage.SCORE in needs(run.config) and until != Stage.GENERATE:
            inputs["verdicts"] = score(run, current, questions, inputs["responses"])
        if until in (Stage.GENERATE, Stage.SCORE) and number == len(run.config.teachers):
            return
        trained = train(run, current, inputs)
        student = LocalModel("student-after", run.fetched(trained), trained.record["digest"])
    if until in (Stage.EVALUATE, Stage.REGISTER):
        evaluated = evaluate(run, questions, [*run.ready.teachers, before(run.ready), student])
        summary.scores(evaluated, trained)
        if until == Stage.REGISTER:
            summary.registered(*register(run, trained, evaluated))


def needs(config: Config) -> tuple[Stage, ...]:
    """Which of generate and score the objective asks for."""
    if config.train.targets == "labels":
        return ()
    scored = config.train.objective == "masters" and config.rewards.accuracy != "off"
    return (Stage.GENERATE, Stage.SCORE) if scored else (Stage.GENERATE,)
