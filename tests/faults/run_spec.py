"""The specification of a pipeline in the fault tests. Imports nothing heavy."""

from dataclasses import dataclass

from masters.config.stages import Stage


@dataclass(frozen=True)
class Shape:
    """The stages and settings of a run: `ranks` trainers, and a judge's URL (none: rules).

    `key`: of a run that is tried again; without one each start is a run of its own.
    """

    until: Stage = Stage.SCORE
    ranks: int = 1
    judge: str = ""
    rebuild: Stage | None = None
    key: str = ""
