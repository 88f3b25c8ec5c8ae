"""Stands in for an engine where its scheduling and its end are tested: a piece is a file that it creates."""

import os
import signal
import time
from pathlib import Path

from masters.common.errors import InputError
from masters.execution.engines import EnginePiece, EngineSetup
from masters.execution.events import ShardAnswered


class StubSetup(EngineSetup):
    out_folder: Path


class StubPiece(EnginePiece):
    """`kills`: the engine kills itself; `fails`: it raises an error; `seconds`: it takes that long."""

    kills: bool = False
    fails: bool = False
    seconds: float = 0.0


class Worker:
    Setup, Piece = StubSetup, StubPiece

    def __init__(self, setup: StubSetup) -> None:
        self._folder = setup.out_folder

    def do(self, piece: StubPiece) -> ShardAnswered:
        if piece.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if piece.fails:
            raise InputError("no such picture")
        time.sleep(piece.seconds)
        (self._folder / piece.out).touch()
        return ShardAnswered(questions=1)
