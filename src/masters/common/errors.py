"""Everything that Masters raises on purpose.

MastersError            something went wrong while it ran (exit 1)
├── InputError          the user's input is at fault; nothing was started (exit 2)
│   └── Unreachable     a store or server that is named does not answer: it may in a minute
├── ArtifactError       an artifact is missing, incomplete or not what its record says
├── StoreError          the store failed or stopped answering while it was used
├── RunsFailed          runs of a study failed; what the others found is in its `report`
├── TrackingError       MLflow failed or stopped answering while it was used
└── WorkerError         a child process (engine or trainer) failed
    └── WorkerLost      it was ended from outside or fell silent: another try may succeed
"""

from masters.common.redaction import redact


class MastersError(Exception):
    """A failure with one clear line for the user, without the secrets that the libraries beneath put into theirs."""

    exit_code = 1

    def __init__(self, said: object = "") -> None:
        super().__init__(redact(str(said)))


class InputError(MastersError):
    """Bad configuration, data or models, found before work starts."""

    exit_code = 2


class Unreachable(InputError):
    """A store or a server that the input names does not answer."""


class ArtifactError(MastersError):
    """An artifact is missing, incomplete or not what its record says."""


class StoreError(MastersError):
    """The store failed or stopped answering while it was used."""


class RunsFailed(MastersError):
    """Runs of a study failed. `report`: what the study found nevertheless."""

    def __init__(self, said: object, report: dict) -> None:
        super().__init__(said)
        self.report = report


class TrackingError(MastersError):
    """MLflow failed or stopped answering while it was used."""


class WorkerError(MastersError):
    """A child process ended with an error."""


class WorkerLost(WorkerError):
    """A child process was ended by a signal, or said nothing for too long."""
