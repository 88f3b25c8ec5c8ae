"""Where the runs into a store are tracked, kept in the store itself, without secrets.

What aliases stand for in one of these MLflows must not be removed; a machine that never made a run must know of it.
"""

import json

from masters.identity import fingerprint
from masters.secrets import masked
from masters.storage import Storage

FOLDER = "tracking"
BESIDE = "beside the artifacts"  # the default database of a local store moves with it


def note(storage: Storage, shown: str, default: str) -> None:
    """Keep an address. `default`: that of the database beside the artifacts. One file each: nobody overwrites."""
    told = BESIDE if shown == default and storage.local else masked(shown)
    name = f"{FOLDER}/{fingerprint(told)}.json"
    if not storage.exists(name):
        storage.write(name, json.dumps(dict(uri=told)).encode())


def noted(storage: Storage, default: str) -> dict[str, str]:
    """The addresses, each with the URI of the file that says so."""
    found = {}
    for name in storage.names(FOLDER):
        told = json.loads(storage.read(name))["uri"]
        found[default if told == BESIDE else told] = storage.uri(name)
    return found
