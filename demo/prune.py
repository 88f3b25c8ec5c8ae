"""Prune a model by magnitude: `python -m demo.prune FOLDER OUT --ratio 0.585`.

Sets the smallest weights of each masked matrix to zero for good, with the masks of the method (Eq. 1-2). What comes out
is a teacher that is confidently wrong: no later training has taught it to be unsure where it lost what it knew.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from masters.models.masking import copy_masked, is_masked, magnitude_thresholds


def prune(folder: Path, out: Path, ratio: float) -> None:
    """Write the model in `folder` to `out`, with a share `ratio` of each masked matrix set to zero."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        if is_masked(name, weight.ndim):
            copy_masked(weight, weight.clone(), *magnitude_thresholds(weight, [ratio]))
    model.save_pretrained(out)
    AutoProcessor.from_pretrained(folder).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratio", type=float, required=True, help="the share of weights to set to zero, 0 to 1")
    given = parser.parse_args()
    if not 0 <= given.ratio <= 1:
        parser.error(f"--ratio: expected a share from 0 to 1, found {given.ratio:g}")
    if not (given.folder / "config.json").is_file():
        parser.error(f"expected a model folder with config.json, found none at {given.folder}")
    prune(given.folder, given.out, given.ratio)


if __name__ == "__main__":
    main()
