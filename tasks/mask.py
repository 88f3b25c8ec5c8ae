"""mask: exact magnitude thresholds of a teacher's weights at every ratio of its schedule (Eq. 1-2)."""

from prefect import task

from masters.store import tables
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build_or_reuse import TASK_OPTIONS, StageResult, build_or_reuse, write_file
from masters.tasks.run_context import Context, Round, Run

VERSION = 1


def make_identity(context: Context, current: Round) -> Identity:
    config = dict(ratios=current.ratios, **context.config.mask.model_dump())
    teacher = current.teacher
    return Identity(f"mask{current.suffix}", VERSION, config, {"teacher": teacher.digest}, slug=teacher.name)


@task(name="mask", task_run_name="mask{current.suffix}", **TASK_OPTIONS)
def mask(run: Run, current: Round) -> Artifact:
    """Build the table `thresholds`: a row for each masked tensor and ratio, with the sparsity that results."""
    identity = make_identity(run, current)

    def build() -> StageResult:
        from masters.models.masking import group_thresholds, iterate_tensors

        settings, folder = run.config.mask, current.teacher.folder
        rows = group_thresholds(
            lambda: iterate_tensors(folder), current.ratios, settings.granularity, tuple(settings.exclude)
        )
        files = write_file(run.storage, identity, "thresholds/all.parquet", tables.encode(rows, tables.THRESHOLDS))
        sparsity = {str(ratio): _sparsity(rows, ratio) for ratio in current.ratios}
        return StageResult(files, dict(rows=len(rows), sparsity=sparsity))

    return build_or_reuse(run, identity, {"teacher": current.teacher.origin}, build)


def _sparsity(rows: list[dict], ratio: float) -> float:
    """Return the share of zeros among the masked weights at this ratio."""
    at_ratio = [row for row in rows if row["mask_ratio"] == ratio]
    return sum(row["zeros"] for row in at_ratio) / max(1, sum(row["numel"] for row in at_ratio))


def read_thresholds(masks: Artifact) -> dict[float, dict[str, float]]:
    """Read {ratio: {tensor name: threshold}} from a mask artifact."""
    thresholds: dict[float, dict[str, float]] = {}
    for row in masks.rows("thresholds", ["tensor", "mask_ratio", "threshold"]):
        thresholds.setdefault(row["mask_ratio"], {})[row["tensor"]] = row["threshold"]
    return thresholds
