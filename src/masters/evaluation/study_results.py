"""The finished runs of a study, one small JSON file each: enough for the study's table and tests. Imports no torch.

A run's file holds one bit per question, in the order of sorted question ids. The image of each question is stored once,
in a separate file named by the digest of ids and images. A study continues from these files on any machine.

Shapes: Q questions, in the order of their ids.
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
from masters.common.files import write_atomically
from masters.common.hashing import canonical_json, digest
from masters.config import Section
from masters.config.loading import describe_errors

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
        """The evaluated split: learning rates are chosen on validation questions, before test questions are used."""
        return "validation" if self.phase == "tuning" else "test"


class Questions(Section):
    """The evaluated questions. `images`: the number of each question's image, [Q]."""

    digest: str
    count: int
    images: str  # Base64 of zlib of little-endian uint32

    @property
    def image_Q(self) -> list[int]:
        return np.frombuffer(zlib.decompress(base64.b64decode(self.images)), "<u4").tolist()


class Result(Section):
    """The result of a finished run."""

    arm: str
    phase: Phase
    learning_rate: float
    seed: int
    settings: str  # digest of all inputs of the run
    steps: int  # optimizer steps
    accuracy: float
    standard_error: float  # clustered by image
    untrained: float  # accuracy of the student before training
    questions: str  # digest of the questions
    count: int
    correct: str  # Base64 of one bit per question
    mlflow_run_id: str

    @property
    def cell(self) -> Cell:
        return Cell(self.phase, self.arm, self.learning_rate, self.seed)

    @property
    def correct_Q(self) -> np.ndarray:
        """Whether each question was answered correctly, bool [Q]."""
        bits = np.frombuffer(base64.b64decode(self.correct, validate=True), np.uint8)
        return np.unpackbits(bits, count=self.count).astype(bool)


def make_questions(images: Mapping[str, str]) -> Questions:
    """Create `Questions` from the digests of images by question id."""
    ordered = sorted(images.items())
    _, image_Q = np.unique([image for _, image in ordered], return_inverse=True)
    packed = base64.b64encode(zlib.compress(image_Q.astype("<u4").tobytes(), 9)).decode()
    return Questions(digest=digest(canonical_json(ordered).encode())[:16], count=len(ordered), images=packed)


def encode_correct(correct: Mapping[str, bool]) -> str:
    """Encode whether each question, by its id, was answered correctly: Base64 of one bit per question."""
    return base64.b64encode(np.packbits([correct[question] for question in sorted(correct)]).tobytes()).decode()


class ResultStore:
    """The folder of a study's finished runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, cell: Cell, settings: str) -> Result | None:
        """Return a cell's result, None if it has none. Raises InputError if it is damaged or from other settings."""
        file = self.folder / f"{cell.name}.json"
        if not file.exists():
            return None
        result = _read(file, Result)
        if (result.cell, result.settings) != (cell, settings):
            raise InputError(
                f"{file} is the result of other settings, models, data or code (expected digest {settings}, found "
                f"{result.settings}): move it away to run it again, or choose another folder for results"
            )
        if not _is_complete(result, self.questions(result.questions)):
            raise InputError(f"{file}, or its questions' file, is damaged: move it away to run it again")
        return result

    def save(self, result: Result, questions: Questions) -> None:
        """Write the questions' file and then, atomically, the run's file."""
        write_atomically(self._questions_file(questions.digest), _to_json(questions))
        write_atomically(self.folder / f"{result.cell.name}.json", _to_json(result))

    def questions(self, digest: str) -> Questions:
        """Read the questions of this digest. Raises InputError if their file is missing or damaged."""
        return _read(self._questions_file(digest), Questions)

    def _questions_file(self, digest: str) -> Path:
        return self.folder / f"questions-{digest}.json"


def _is_complete(result: Result, questions: Questions) -> bool:
    """Return whether there is one readable answer and image per question, and the answers give the stated accuracy."""
    try:
        correct, images = int(result.correct_Q.sum()), len(questions.image_Q)
    except (ValueError, zlib.error):  # invalid Base64 or zlib, or too few bits
        return False
    return questions.count == result.count == images and math.isclose(
        correct, result.accuracy * result.count, abs_tol=1e-6
    )


def _read(file: Path, kind: type[S]) -> S:
    try:
        return kind.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    except ValidationError as error:
        raise InputError(
            f"{file} is not a {kind.__name__} of a study ({describe_errors(error)}): move it away"
        ) from None


def _to_json(value: Section) -> str:
    return value.model_dump_json(indent=1) + "\n"
