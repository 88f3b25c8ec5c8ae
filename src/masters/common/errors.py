"""The exceptions that Masters raises.

MastersError            something went wrong while it ran (exit 1)
├── InputError          the user's input is wrong; no work was started (exit 2)
│   └── Unreachable     a store or server that the input names does not answer; a retry may help
├── ArtifactError       an artifact is missing, incomplete or differs from its record
├── StoreError          the store failed or stopped answering while it was used
├── RunsFailed          runs of a study failed; `report` holds the results of the others
├── TrackingError       MLflow failed or stopped answering while it was used
└── WorkerError         a child process (engine or trainer) failed
    └── WorkerLost      it was killed or stopped reporting; a retry may succeed
"""

from masters.common.redaction import redact


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return an error's text on one line, cut at `limit` characters; the name of its type if it has no text."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


class MastersError(Exception):
    """A failure with one clear line for the user. Secrets in the message are redacted."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


class InputError(MastersError):
    """The configuration, data or models are wrong; found before work starts."""

    exit_code = 2


class Unreachable(InputError):
    """A store or a server that the input names does not answer."""


class ArtifactError(MastersError):
    """An artifact is missing, incomplete or differs from its record."""


class StoreError(MastersError):
    """The store failed or stopped answering while it was used."""


class RunsFailed(MastersError):
    """Runs of a study failed. `report` holds the results of the runs that did not."""

    def __init__(self, message: object, report: dict) -> None:
        super().__init__(message)
        self.report = report


class TrackingError(MastersError):
    """MLflow failed or stopped answering while it was used."""


class WorkerError(MastersError):
    """A child process ended with an error."""


class WorkerLost(WorkerError):
    """A child process was ended by a signal, or did not report within its timeout."""
