"""What generate and evaluate share: their shards answered by engines, with a bar, and gathered into the artifact."""

from collections.abc import Sequence

from masters import answering
from masters.answering import Order
from masters.artifacts import Artifact, Identity
from masters.processes import Child
from masters.tasks.stage import Run


def answered(
    run: Run,
    made_of: Identity,
    data: Artifact,
    asked: list[Order],
    ahead: Sequence[Order] = (),
    beside: Child | None = None,
) -> tuple[dict[str, str], dict]:
    """Files of the artifact with digests, and how it ran.

    `ahead`: orders of a later stage, answered while the engines of their models are up; `beside`: a process that runs
    with them.
    """
    built = len(answering.missing(run.storage, asked))
    with run.progress(made_of, "questions") as progress:
        how = answering.fulfil(
            data, [*asked, *ahead], run.config.runtime, run.work(made_of),
            progress.update, beside,
        )  # fmt: skip
    how |= dict(shards=len(asked), shards_built=built, shards_reused=len(asked) - built)
    return answering.gather(run.storage, made_of, asked), how


def forget(run: Run, asked: list[Order]) -> None:
    """Remove the shards of these orders: rebuilding answers every one again."""
    for order in asked:
        run.storage.remove(order.file)
