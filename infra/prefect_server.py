"""`python -m masters.infra.prefect_server PORT PARENT`: Prefect's server on loopback, ended with the process PARENT."""

import sys

import uvicorn

from masters.execution.processes import die_with_parent


def main(port: int) -> None:
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(), host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=3)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))
    main(int(sys.argv[1]))
