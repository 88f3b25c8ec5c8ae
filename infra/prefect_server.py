"""`python -m masters.infra.prefect_server PORT [PARENT]`: Prefect's server on loopback.

It ends with the process PARENT, if one is named.
"""

import sys

import uvicorn

from masters.execution.child_process import die_with_parent
from masters.infra.busy_database import RetryWhileBusy


def main(port: int) -> None:
    from prefect.server.api.server import create_app

    app = RetryWhileBusy(create_app(final=True))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]))
    main(int(sys.argv[1]))
