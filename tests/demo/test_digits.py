"""The training of the digit task's models: `demo.digits`."""

import numpy as np
import pytest
import torch

from demo import build, digits, train
from masters.data.sources.digits import questions


@pytest.fixture(scope="module")
def packer() -> digits.Packer:
    text = digits.tokenizer()
    return digits.Packer(text, build.model("student", text), digits.SIZE)


def test_patches_and_grid_are_those_of_the_processor(packer):
    scenes = digits.Scenes(digits.load_handwriting(), range(50), distortion=1.0, seed=0)
    pictures, _ = scenes.draw(3)
    wanted = build.processor(packer.text).image_processor(pictures, return_tensors="pt")
    torch.testing.assert_close(train.patches(pictures), wanted["pixel_values"])
    assert torch.equal(train.grid(3, digits.SIZE), wanted["image_grid_thw"])


def test_a_changed_digit_and_what_stands_before_it_are_not_learned(packer):
    right, written = "4 + 0 + 7 = 11", "4 + 0 + 9 = 13"
    labels = packer.taught(right, written)
    learned = [token for token in labels if token != train.IGNORE]
    assert packer.text.decode(learned) == " = 13<|im_end|>"
    assert packer.taught(right, right) == packer.segment("", right)[1]


def test_a_changed_answer_follows_from_the_digits_that_it_states():
    rng = np.random.default_rng(0)
    for kind in range(6):
        texts = {digits.changed_digit(rng, [4, 0, 7], kind, share=1.0) for _ in range(50)}
        allowed = {questions(list(scene))[kind].steps for scene in np.ndindex(10, 10, 10)}
        assert texts <= allowed
        assert len(texts) > 1
    assert digits.changed_digit(rng, [4, 0, 7], 0, share=0.0) == "4 + 0 + 7 = 11"


def test_scenes_state_their_digits_and_repeat_with_the_seed():
    written = digits.load_handwriting()
    first, second = (digits.Scenes(written, range(50), 1.0, seed=3).draw(4) for _ in range(2))
    assert torch.equal(first[1], second[1])
    assert [a.tobytes() for a in first[0]] == [b.tobytes() for b in second[0]]
    assert {int(digit) for digit in first[1].flatten()} <= set(written.labels[:50].tolist())
