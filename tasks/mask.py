"""mask: exact magnitude thresholds of a teacher's weights at every ratio of its schedule (Eq. 1-2)."""

from prefect import task

from masters.common.hashing import digest
from masters.store import tables
from masters.store.artifacts import Artifact, Identity
from masters.tasks.build import STAGE, build_or_reuse
from masters.tasks.run_context import Context, Round, Run

VERSION = 1


def identity(context: Context, current: Round) -> Identity:
    config = dict(ratios=current.ratios, **context.config.mask.model_dump())
    teacher = current.teacher
    return Identity(f"mask{current.suffix}", VERSION, config, {"teacher": teacher.digest}, slug=teacher.name)


@task(name="mask", task_run_name="mask{current.suffix}", **STAGE)
def mask(run: Run, current: Round) -> Artifact:
    """Table `thresholds`: one row per masked tensor and ratio, with the sparsity that the threshold gives."""
    made_of = identity(run, current)

    def build() -> tuple[dict[str, str], dict, dict]:
        from masters.models.masking import group_thresholds, safetensors_tensors

        settings, ratios, folder = run.config.mask, current.ratios, current.teacher.folder
        rows = group_thresholds(
            lambda: safetensors_tensors(folder), ratios, settings.granularity, tuple(settings.exclude)
        )
        data = tables.encode(rows, tables.THRESHOLDS)
        run.storage.write(f"{made_of.folder}/thresholds/all.parquet", data)
        sparsity = {
            str(ratio): sum(r["zeros"] for r in rows if r["mask_ratio"] == ratio)
            / max(1, sum(r["numel"] for r in rows if r["mask_ratio"] == ratio))
            for ratio in ratios
        }
        return {"thresholds/all.parquet": digest(data)}, dict(rows=len(rows), sparsity=sparsity), {}

    return build_or_reuse(run, made_of, {"teacher": current.teacher.origin}, build)


def thresholds(masks: Artifact) -> dict[float, dict[str, float]]:
    """{ratio: {tensor: threshold}} of a mask artifact."""
    found: dict[float, dict[str, float]] = {}
    for row in masks.rows("thresholds", ["tensor", "mask_ratio", "threshold"]):
        found.setdefault(row["mask_ratio"], {})[row["tensor"]] = row["threshold"]
    return found
