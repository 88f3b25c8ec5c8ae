"""The finished runs of a study, one small JSON file each: enough for its table and its tests. Imports no torch.

A run's file holds a bit a question, in the order of the sorted question ids; which image a question is about lies
once in a file of its own, named by the digest of ids and images. So a study goes on wherever these files are.
"""

import base64
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import ValidationError

from masters.common.errors import InputError
from masters.common.hashing import canonical, digest
from masters.config import Section
from masters.config.loading import explained

Phase = Literal["tuning", "final"]
S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Cell:
    """One run of a study: an arm at a learning rate and a seed."""

    phase: Phase
    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.phase}-{self.arm}-{self.learning_rate!r}-{self.seed}"

    @property
    def split(self) -> Literal["test", "validation"]:
        """Rates are chosen on validation questions: test questions are not even answered in that phase."""
        return "validation" if self.phase == "tuning" else "test"


class Questions(Section):
    """The evaluated questions: `images` says of each, in the order of their ids, which image it is about."""

    digest: str
    count: int
    images: str  # Base64 of zlib of little-endian uint32

    @property
    def image_Q(self) -> list[int]:
        return np.frombuffer(zlib.decompress(base64.b64decode(self.images)), "<u4").tolist()


class Result(Section):
    """What came of a finished run."""

    arm: str
    phase: Phase
    learning_rate: float
    seed: int
    settings: str  # digest of everything that the run was made from
    steps: int  # optimizer steps
    accuracy: float
    standard_error: float  # clustered by image
    untrained: float  # accuracy of the student before
    questions: str  # their digest
    count: int
    correct: str  # Base64 of a bit a question
    mlflow_run_id: str

    @property
    def cell(self) -> Cell:
        return Cell(self.phase, self.arm, self.learning_rate, self.seed)

    @property
    def correct_Q(self) -> np.ndarray:
        """Whether each question was answered rightly, bool [Q], in the order of their ids."""
        bits = np.frombuffer(base64.b64decode(self.correct, validate=True), np.uint8)
        return np.unpackbits(bits, count=self.count).astype(bool)


def questions_of(images: Mapping[str, str]) -> Questions:
    """From question ids to images' digests."""
    ordered = sorted(images.items())
    _, image_Q = np.unique([image for _, image in ordered], return_inverse=True)
    packed = base64.b64encode(zlib.compress(image_Q.astype("<u4").tobytes(), 9)).decode()
    return Questions(digest=digest(canonical(ordered).encode())[:16], count=len(ordered), images=packed)


def packed_bits(correct: Mapping[str, bool]) -> str:
    """Base64 of a bit a question, in the order of their ids."""
    return base64.b64encode(np.packbits([correct[question] for question in sorted(correct)]).tobytes()).decode()


class Results:
    """The folder of a study's finished runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, cell: Cell, settings: str) -> Result | None:
        """The finished run of a cell. Raises InputError if its file is of other settings, or is none of ours."""
        file = self.folder / f"{cell.name}.json"
        if not file.exists():
            return None
        found = _read(file, Result)
        if (found.cell, found.settings) != (cell, settings):
            raise InputError(
                f"{file} is the result of other settings, models, data or code (expected {settings}, found "
                f"{found.settings}): move it away to have it run again, or choose another folder for results"
            )
        if not _is_whole(found, self.questions(found.questions)):
            raise InputError(f"{file}, or its questions' file, is damaged: move it away to run it again")
        return found

    def keep(self, result: Result, asked: Questions) -> None:
        """Write a run's file, last and at once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._questions_file(asked.digest), asked)
        _write(self.folder / f"{result.cell.name}.json", result)

    def questions(self, digest: str) -> Questions:
        """Raises InputError if they are not there."""
        return _read(self._questions_file(digest), Questions)

    def _questions_file(self, digest: str) -> Path:
        return self.folder / f"questions-{digest}.json"


def _is_whole(found: Result, asked: Questions) -> bool:
    """Whether answers and images can be read, there is one of each a question, and the answers give the accuracy."""
    try:
        right, images = int(found.correct_Q.sum()), len(asked.image_Q)
    except (ValueError, zlib.error):  # no Base64, bits missing, no zlib
        return False
    return asked.count == found.count == images and math.isclose(right, found.accuracy * found.count, abs_tol=1e-6)


def _read(file: Path, kind: type[S]) -> S:
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    except ValidationError as error:
        raise InputError(f"{file} is no {kind.__name__} of a study ({explained(error)}): move it away") from None


def _write(file: Path, value: Section) -> None:
    part = file.with_suffix(".part")
    part.write_text(value.model_dump_json(indent=1) + "\n")
    part.replace(file)
