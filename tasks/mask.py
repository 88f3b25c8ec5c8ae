"""mask: exact magnitude thresholds of a teacher's weights at every ratio of its schedule (Eq. 1-2)."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from masters import schemas
from masters.artifacts import Artifact, Identity
from masters.config import Teacher
from masters.identity import digest
from masters.preflight import LocalModel, ratios
from masters.tasks.stage import Run, build_or_reuse

VERSION = 1


def identity(run: Run, teacher: Teacher, model: LocalModel, stage: str) -> Identity:
    config = dict(ratios=ratios(teacher), **run.config.mask.model_dump())
    return Identity(stage, VERSION, config, {"teacher": model.digest}, slug=model.name)


@task(name="mask", task_run_name="{stage}", cache_policy=NO_CACHE)
def mask(run: Run, teacher: Teacher, model: LocalModel, stage: str = "mask") -> Artifact:
    """Table `thresholds`: one row per masked tensor and ratio, with the sparsity that the threshold gives."""
    made_of = identity(run, teacher, model, stage)

    def build() -> tuple[dict[str, str], dict, dict]:
        from masters.models.masking import group_thresholds, safetensors_tensors

        settings = run.config.mask
        rows = group_thresholds(
            lambda: safetensors_tensors(model.folder), ratios(teacher), settings.granularity, tuple(settings.exclude)
        )
        data = schemas.encode(rows, schemas.THRESHOLDS)
        run.storage.write(f"{made_of.folder}/thresholds/all.parquet", data)
        sparsity = {
            str(ratio): sum(r["zeros"] for r in rows if r["mask_ratio"] == ratio)
            / max(1, sum(r["numel"] for r in rows if r["mask_ratio"] == ratio))
            for ratio in ratios(teacher)
        }
        return {"thresholds/all.parquet": digest(data)}, dict(rows=len(rows), sparsity=sparsity), {}

    return build_or_reuse(run, made_of, build)


def thresholds(masks: Artifact) -> dict[float, dict[str, float]]:
    """{ratio: {tensor: threshold}} of a mask artifact."""
    found: dict[float, dict[str, float]] = {}
    for row in masks.rows("thresholds", ["tensor", "mask_ratio", "threshold"]):
        found.setdefault(row["mask_ratio"], {})[row["tensor"]] = row["threshold"]
    return found
