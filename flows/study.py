"""A study: choose each arm's learning rate on validation questions, then test the arms with other seeds."""

from collections.abc import Iterator
from pathlib import Path

from prefect import flow

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
from masters.evaluation.study_results import Cell, Result, ResultStore, encode_correct, make_questions
from masters.evaluation.study_runs import StudyRuns
from masters.flows.distill import close_crashed_run, finish_with_status, open_tracker, run_pipeline
from masters.flows.plan import stage_identities
from masters.flows.retries import flow_attempt, raise_if_interrupted, retry_unreachable
from masters.flows.summary import Summary
from masters.reporting.study_report import write_report
from masters.reporting.study_table import format_arm
from masters.tasks import train, work_pools
from masters.tasks.evaluate import greedy_sampling
from masters.tasks.progress import warn
from masters.tasks.report import report_study
from masters.tasks.run_context import Context, Run
from masters.tracking.run_writer import RunWriter

PLACEHOLDER_RATE = 1e-6  # stands for the learning rate in the digest of an arm's settings


@flow(name="study", flow_run_name="{design.name}", on_crashed=[close_crashed_run], persist_result=False)
def study(config: Config, design: Study) -> dict:
    """Compare arms over learning rates and seeds. Returns the report, which is also written beside the results.

    Runs whose result already exists are not repeated. If a run fails, the others still run, the report shows its
    error, and the flow fails at the end.

    Args:
        config: The base configuration of all arms.
        design: The arms, their learning rates and seeds, and the planned comparisons.
    """
    with flow_attempt():
        allowlist.check_allowed(Setting.STORES, "results", allowlist.absolute_root(design.results))
        runner = StudyRunner(config, design)
        tracker = open_tracker(config, runner.storage, "study")
        with finish_with_status(tracker):
            report: dict = {**runner.run(tracker), "mlflow": dict(run_id=tracker.run_id)}
            if failed := [run["run"] for run in report["failed"]]:
                raise RunsFailed(
                    f"study {design.name}: {len(failed)} runs failed, {report['runs']} finished; run it again to "
                    f"continue: {', '.join(failed)}",
                    report,
                )
    return report


class StudyRunner:
    """Runs a study. `runs` holds the results and errors of its runs so far."""

    def __init__(self, config: Config, design: Study) -> None:
        configs = {name: arm_config(config, design, name) for name in design.arms}
        self._contexts = {
            name: Context(arm, retry_unreachable(lambda arm=arm: preflight(arm))) for name, arm in configs.items()
        }
        self._settings_digests = {name: settings_digest(context) for name, context in self._contexts.items()}
        self._design, self._results = design, ResultStore(Path(design.results))
        self.runs = StudyRuns(design)
        self.storage = next(iter(self._contexts.values())).storage
        for arm in configs.values():
            work_pools.check_pools(arm, self.storage)

    def run(self, tracker: RunWriter) -> dict:
        """Run every cell that has no result yet. Returns the report and logs its files to the MLflow run."""
        self._run_cells(list(tuning_cells(self._design)), tracker)
        self._run_cells(list(final_cells(self.runs)), tracker)
        report, folder = write_report(self.runs, self._results)
        report_study(self._design.name, [format_arm(row) for row in report["arms"]])
        tracker.log_files(folder)
        accuracies = {f"accuracy_{row['arm']}": row["accuracy"] for row in report["arms"] if row["seeds"]}
        tracker.log_metrics(accuracies, 0)
        return report

    def report_finished(self) -> dict:
        """Write the report on the finished runs without running any. Returns it with the names of the missing runs."""
        missing = self._load_results(list(tuning_cells(self._design)))
        missing += self._load_results(list(final_cells(self.runs)))
        report, _ = write_report(self.runs, self._results)
        return report | dict(missing=[cell.name for cell, _ in missing])

    def _run_cells(self, cells: list[Cell], tracker: RunWriter) -> None:
        """Load or compute the result of every cell. Raises MastersError if arms took different numbers of steps."""
        for cell, settings in self._load_results(cells):
            if result := self._try_cell(cell, settings, tracker):
                self.runs.results[cell] = result
                self.runs.check_steps()

    def _load_results(self, cells: list[Cell]) -> list[tuple[Cell, str]]:
        """Load all results, so that a file with other settings is refused before hours are spent.

        Returns the cells without a result, each with the digest of its settings.
        """
        digests = [fingerprint([self._settings_digests[c.arm], c.learning_rate, c.seed, c.split]) for c in cells]
        stored = [self._results.find(cell, settings) for cell, settings in zip(cells, digests, strict=True)]
        self.runs.results |= {cell: result for cell, result in zip(cells, stored, strict=True) if result}
        self.runs.check_steps()
        missing = zip(cells, digests, stored, strict=True)
        return [(cell, settings) for cell, settings, result in missing if result is None]

    def _try_cell(self, cell: Cell, settings: str, tracker: RunWriter) -> Result | None:
        """Return the result of a run. If the run fails, record its error and return None."""
        arm = self._contexts[cell.arm]
        values = {"train.learning_rate": cell.learning_rate, "train.seed": cell.seed, "evaluate.split": cell.split}
        try:
            return self._run_cell(cell, Context(override_values(arm.config, values), arm.resources), settings, tracker)
        except Exception as error:  # an error of any type must not end the study
            raise_if_interrupted(error)
            self.runs.errors[cell] = redact(str(error) or type(error).__name__)
            warn(f"{cell.name} failed: {self.runs.errors[cell]}")
        return None

    def _run_cell(self, cell: Cell, context: Context, settings: str, parent: RunWriter) -> Result:
        """Train and evaluate a cell's student in an MLflow run below that of the study, and store the result."""
        key = digest(f"{parent.key} {cell.name}".encode())[:32]
        tracker = RunWriter(context.config, context.storage, key)
        tracker.nest_under(parent.run_id, cell.name, {"study.arm": cell.arm, "study.phase": cell.phase})
        with finish_with_status(tracker):
            run = Run(context, tracker)
            run_pipeline(run, Summary(run, key), Stage.EVALUATE)
            return self._store_result(cell, run, settings)

    def _store_result(self, cell: Cell, run: Run, settings: str) -> Result:
        """Store which questions the trained student answered correctly, with its accuracy. Returns the result."""
        evaluated, data = run.artifacts[Stage.EVALUATE], run.artifacts[Stage.DATA]
        rows = evaluated.rows("predictions", ["question_id", "model", "correct"])
        correct = {row["question_id"]: row["correct"] for row in rows if row["model"] == STUDENT_AFTER}
        images = {
            row["question_id"]: row["image_digest"]
            for row in data.rows("questions", ["question_id", "image_digest"])
            if row["question_id"] in correct
        }
        questions, scores = make_questions(images), evaluated.facts["scores"]
        result = Result(
            arm=cell.arm,
            phase=cell.phase,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            settings=settings,
            steps=count_steps(run),
            accuracy=scores[STUDENT_AFTER]["accuracy"],
            standard_error=scores[STUDENT_AFTER]["standard_error"],
            untrained=scores[STUDENT_BEFORE]["accuracy"],
            questions=questions.digest,
            count=questions.count,
            correct=encode_correct(correct),
            mlflow_run_id=run.tracker.run_id,
        )
        self._results.save(result, questions)
        return result


def count_steps(run: Run) -> int:
    """Return the number of optimizer steps in all rounds, without steps that a rollback undid."""
    trained = [artifact.facts for name, artifact in run.artifacts.items() if name.split("-")[0] == Stage.TRAIN]
    return sum(train.steps_taken(facts) for facts in trained)


def tuning_cells(design: Study) -> Iterator[Cell]:
    """Yield the runs that choose learning rates: none for an arm with a single rate.

    Arms alternate, so that different numbers of steps show early.
    """
    most_rates = max(len(design.rates(arm)) for arm in design.arms)
    for seed in design.tuning_seeds:
        for number in range(most_rates):
            for arm in design.arms:
                rates = design.rates(arm)
                if len(rates) > 1 and number < len(rates):
                    yield Cell("tuning", arm, rates[number], seed)


def final_cells(runs: StudyRuns) -> Iterator[Cell]:
    """Yield the runs at the chosen learning rates. An arm whose rate could not be chosen has none."""
    for seed in runs.study.seeds:
        for arm in runs.study.arms:
            if rate := runs.chosen_rate(arm):
                yield Cell("final", arm, rate, seed)


def settings_digest(context: Context) -> str:
    """Return a digest of everything that an arm's results depend on: settings, models, data and stage versions.

    Learning rate, seed and split are left out, because each run has its own.
    """
    config = override_values(context.config, {"train.learning_rate": PLACEHOLDER_RATE, "train.seed": 0})
    identities = stage_identities(Context(config, context.resources))
    stages = [identity.fingerprint for identity in identities if identity.kind != Stage.REGISTER]
    return fingerprint(dict(stages=stages, asked=greedy_sampling(config).to_identity()))
