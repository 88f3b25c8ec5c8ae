"""What a pipeline of the fault tests is to do. Read also where nothing heavy is imported."""

from dataclasses import dataclass

from masters.config.stages import Stage


@dataclass(frozen=True)
class Shape:
    """How far a run goes, and with what: `ranks` trainers, a judge's URL (none: the rules judge).

    `key`: of a run that is tried again; without one each start is a run of its own.
    """

    until: Stage = Stage.SCORE
    ranks: int = 1
    judge: str = ""
    rebuild: Stage | None = None
    key: str = ""
