"""A study: each arm's learning rate is chosen on validation questions, then the arms are tested at fresh seeds."""

from collections.abc import Iterator
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from masters.checks.model_folder import STUDENT_AFTER, STUDENT_BEFORE
from masters.checks.preflight import preflight
from masters.common.errors import RunsFailed
from masters.common.hashing import digest, fingerprint
from masters.common.redaction import redact
from masters.config import Config, allowlist
from masters.config.allowlist import Setting
from masters.config.loading import override_values
from masters.config.stages import Stage
from masters.config.study_file import Study, arm_config
from masters.evaluation.study_results import Cell, Result, Results, packed_bits, questions_of
from masters.flows.distill import close_crashed_run, run_pipeline
from masters.flows.plan import stage_identities
from masters.flows.retries import flow_attempt, retry_unreachable
from masters.flows.summary import Summary
from masters.reporting.study_report import write_report
from masters.reporting.study_table import StudyRuns, shown_arm
from masters.tasks import train, work_pools
from masters.tasks.evaluate import greedy_sampling
from masters.tasks.progress import warn
from masters.tasks.report import report_study
from masters.tasks.run_context import Context, Run
from masters.tracking.run_writer import RunWriter

RATE = 1e-6  # in the digest of an arm's settings, to which each run adds its own rate, seed and split


@flow(name="study", flow_run_name="{design.name}", on_crashed=[close_crashed_run], persist_result=False)
def study(config: Config, design: Study) -> dict:
    """Compare arms over learning rates and seeds. Returns the report, which is also written beside the results.

    A run whose result is there already is not run again. One that fails is a row with its error; the others still run,
    and the flow fails at the end.

    Args:
        config: What every arm starts from.
        design: The arms, their learning rates and seeds, and the planned comparisons.
    """
    with flow_attempt():
        allowlist.check_allowed(Setting.STORES, "results", allowlist.absolute_root(design.results))
        conductor = StudyRunner(config, design)
        tracker = retry_unreachable(lambda: RunWriter(config, conductor.storage, str(flow_run.id or ""), "study"))
        status = "FAILED"
        try:
            report = conductor.conduct(tracker)
            status = "FAILED" if report["failed"] else "FINISHED"
        finally:
            if untold := tracker.finish(status):
                warn(untold)
        report |= dict(mlflow=dict(run_id=tracker.run_id))
        if failed := [run["run"] for run in report["failed"]]:
            raise RunsFailed(
                f"study {design.name}: {len(failed)} runs failed, {report['runs']} finished; run it again to go on: "
                f"{', '.join(failed)}",
                report,
            )
    return report


class StudyRunner:
    """A study under way: its arms' configurations with what preflight found, and the runs until now."""

    def __init__(self, config: Config, design: Study) -> None:
        configs = {arm: arm_config(config, design, arm) for arm in design.arms}
        self._arms = {
            arm: Context(own, retry_unreachable(lambda own=own: preflight(own))) for arm, own in configs.items()
        }
        self._made_of = {arm: settings_digest(own) for arm, own in self._arms.items()}
        self._design, self._results = design, Results(Path(design.results))
        self.found = StudyRuns(design)
        self.storage = next(iter(self._arms.values())).storage
        for own in configs.values():
            work_pools.check_pools(own, self.storage)

    def conduct(self, tracker: RunWriter) -> dict:
        """Run every cell that has no result yet. Returns the report; its files are also in MLflow's run."""
        self._finish(list(tuning_cells(self._design)), tracker)
        self._finish(list(final_cells(self.found)), tracker)
        report, folder = write_report(self.found, self._results)
        report_study(self._design.name, [shown_arm(row) for row in report["arms"]])
        tracker.files(folder)
        accuracies = {f"accuracy_{row['arm']}": row["accuracy"] for row in report["arms"] if row["seeds"]}
        tracker.metrics(accuracies, 0)
        return report

    def _finish(self, cells: list[Cell], tracker: RunWriter) -> None:
        """Find or make the result of every cell. Raises MastersError where arms took unequal numbers of steps."""
        contexts = [self._context(cell) for cell in cells]
        digests = [fingerprint([self._made_of[c.arm], c.learning_rate, c.seed, c.split]) for c in cells]
        # all before the first run: a file of other settings is refused before hours are spent
        kept = [self._results.find(cell, made_of) for cell, made_of in zip(cells, digests, strict=True)]
        for cell, context, made_of, result in zip(cells, contexts, digests, kept, strict=True):
            if result := result or self._tried(cell, context, made_of, tracker):
                self.found.results[cell] = result
                self.found.check_steps()

    def _context(self, cell: Cell) -> Context:
        arm = self._arms[cell.arm]
        values = {"train.learning_rate": cell.learning_rate, "train.seed": cell.seed, "evaluate.split": cell.split}
        return Context(override_values(arm.config, values), arm.resources)

    def _tried(self, cell: Cell, context: Context, made_of: str, tracker: RunWriter) -> Result | None:
        """The result of a run, None if it failed: the others still run."""
        try:
            return self._run(cell, context, made_of, tracker)
        except Exception as error:  # of whatever kind
            self.found.errors[cell] = redact(str(error) or type(error).__name__)
            warn(f"{cell.name} failed: {self.found.errors[cell]}")
        return None

    def _run(self, cell: Cell, context: Context, made_of: str, parent: RunWriter) -> Result:
        """Train and evaluate a cell's student, below the study's run in MLflow, and keep what came of it."""
        key = digest(f"{parent.key} {cell.name}".encode())[:32]
        tracker = RunWriter(context.config, context.storage, key)
        tracker.nest(parent.run_id, cell.name, {"study.arm": cell.arm, "study.phase": cell.phase})
        status = "FAILED"
        try:
            run = Run(context, tracker)
            run_pipeline(run, Summary(run, key), Stage.EVALUATE)
            result = self._keep(cell, run, made_of)
            status = "FINISHED"
        finally:
            if untold := tracker.finish(status):
                warn(untold)
        return result

    def _keep(self, cell: Cell, run: Run, made_of: str) -> Result:
        """Write the result of a finished run."""
        evaluated, data = run.artifacts[Stage.EVALUATE], run.artifacts[Stage.DATA]
        rows = evaluated.rows("predictions", ["question_id", "model", "correct"])
        correct = {row["question_id"]: row["correct"] for row in rows if row["model"] == STUDENT_AFTER}
        images = {
            row["question_id"]: row["image_digest"]
            for row in data.rows("questions", ["question_id", "image_digest"])
            if row["question_id"] in correct
        }
        asked, scores = questions_of(images), evaluated.facts["scores"]
        result = Result(
            arm=cell.arm, phase=cell.phase, learning_rate=cell.learning_rate, seed=cell.seed, settings=made_of,
            steps=steps_taken(run), accuracy=scores[STUDENT_AFTER]["accuracy"],
            standard_error=scores[STUDENT_AFTER]["standard_error"], untrained=scores[STUDENT_BEFORE]["accuracy"],
            questions=asked.digest, count=asked.count, correct=packed_bits(correct), mlflow_run_id=run.tracker.run_id,
        )  # fmt: skip
        self._results.keep(result, asked)
        return result


def steps_taken(run: Run) -> int:
    """Optimizer steps of all rounds, without those after which a student was put back."""
    trained = [made.facts for stage, made in run.artifacts.items() if stage.split("-")[0] == Stage.TRAIN]
    return sum(train.steps_taken(facts) for facts in trained)


def tuning_cells(design: Study) -> Iterator[Cell]:
    """Runs by which rates are chosen, none for an arm of one rate; arms alternate, so that unequal steps show early."""
    most = max(len(design.rates(arm)) for arm in design.arms)
    for seed in design.tuning_seeds:
        for number in range(most):
            for arm in design.arms:
                rates = design.rates(arm)
                if len(rates) > 1 and number < len(rates):
                    yield Cell("tuning", arm, rates[number], seed)


def final_cells(found: StudyRuns) -> Iterator[Cell]:
    """Runs at the chosen rates, none of an arm whose rate could not be chosen."""
    for seed in found.study.seeds:
        for arm in found.study.arms:
            if rate := found.chosen(arm):
                yield Cell("final", arm, rate, seed)


def settings_digest(context: Context) -> str:
    """Fingerprint of all that an arm's results follow from: settings, models, data and versions of the stages.

    The configuration's learning rate, seed and split have no part in it: these are each run's own.
    """
    own = override_values(context.config, {"train.learning_rate": RATE, "train.seed": 0})
    stages = [
        made_of.fingerprint for made_of in stage_identities(Context(own, context.resources)) if made_of.kind != Stage.REGISTER
    ]
    return fingerprint(dict(stages=stages, asked=greedy_sampling(own).to_identity()))
