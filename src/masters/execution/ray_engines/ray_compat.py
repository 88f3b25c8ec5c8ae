"""Private parts of Ray that this project uses, written for Ray 2.60.0. A new version must be checked against them.

`ray.init` takes the address to listen on and the folder for its files through arguments that begin with an
underscore; what to listen on, and the token that callers must show, are set in undocumented environment variables,
which Ray reads when it is imported. Nothing may import ray before.
"""

import os
import secrets

VERSION = "2.60.0"
LOOPBACK = "127.0.0.1"
# without it Ray takes the machine's own address and listens on all
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# the output of engines goes into a log file; no usage statistics are sent
QUIET = {"RAY_COLOR_PREFIX": "0", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}
OBJECT_STORE_BYTES = 100 * 2**20  # only references and lists of questions travel


def start_local(workers: int, folder: str) -> None:
    """Start a Ray on loopback without a dashboard, whose callers must show a token that this process makes."""
    os.environ |= QUIET | ON_LOOPBACK | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
    import ray

    ray.init(
        address="local",
        num_cpus=workers,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
        _temp_dir=folder,
    )


def connect(address: str) -> None:
    """Connect to the cluster whose head is at HOST:PORT. Raises what `ray.init` raises."""
    is_local = address.startswith(LOOPBACK)
    os.environ |= QUIET | (ON_LOOPBACK if is_local else {})
    import ray

    ray.init(address=address, _node_ip_address=LOOPBACK if is_local else None)
