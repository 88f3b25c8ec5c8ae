"""Stands in for an engine where its dealing and dying are tested: a piece is a file that it touches."""

import os
import signal
import time
from pathlib import Path

from masters.common.errors import InputError


class Pieces:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def do(self, piece: dict) -> dict:
        if piece.get("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        if piece.get("bad"):
            raise InputError("no such picture")
        time.sleep(piece.get("seconds", 0))
        (self._folder / piece["out"]).touch()
        return dict(event="shard", questions=1, pid=os.getpid())


def opened(setup: dict) -> Pieces:
    return Pieces(Path(setup["folder"]))
