"""Captions are worded and read by one rule, which the demo's models and its judge are trained by."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from demo import build, captions, train
from demo.judge_captions import CaptionMaker
from demo.wordings import captions_of, describes, read
from masters.data.sources.captions import COLORS, RELATIONS, SHAPES, Scene, Thing, pools

THINGS = st.builds(Thing, st.sampled_from(list(COLORS)), st.sampled_from(SHAPES))
SCENES = st.builds(Scene, st.sampled_from(list(RELATIONS)), THINGS, THINGS).filter(lambda s: s.first != s.second)
RED, BLUE = Thing("red", "circle"), Thing("blue", "star")


@given(scene=SCENES, data=st.data())
def test_every_wording_is_read_as_its_scene_and_as_no_other(scene: Scene, data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(captions_of(scene)))
    other = data.draw(SCENES.filter(lambda s: s != scene))
    assert read(text) == read(text.upper()) == read(scene.caption) == scene
    assert describes(text, scene.caption) and not describes(text, other.caption)


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        ("The blue star is right of the red circle.", Scene("row", RED, BLUE)),
        ("a blue star left of a red circle", Scene("row", BLUE, RED)),
        ("there is a red circle above a blue star", Scene("column", RED, BLUE)),
        ("at the bottom a red circle, at the top a blue star", Scene("column", BLUE, RED)),
        ("", None), ("a red circle", None), ("a red circle and a blue star", None), ("a red left of a blue star", None),
        ("a red circle left of a blue star and a green star", None), ("a pink circle left of a blue star", None),
        ("a red circle on the left and a blue star on the left", None),
    ],
)  # fmt: skip
def test_things_are_read_where_the_words_put_them(text: str, scene: Scene | None) -> None:
    assert read(text) == scene


@pytest.fixture(scope="module")
def packer() -> train.Packer:
    text = captions.tokenizer()
    torch.manual_seed(0)
    return train.Packer(text, build.model("student", text), captions.Scenes.size)


def test_the_tokenizer_gives_each_word_a_token(packer: train.Packer) -> None:
    for text in {text for scene in pools()["test"] for text in captions_of(scene)}:
        assert len(packer.text(text)["input_ids"]) == len(re.findall(r"\w+|,", text)), text


def test_scenes_repeat_with_the_seed_and_state_their_attributes() -> None:
    pool = pools()["teacher"]
    first, second = (captions.Scenes(pool, None, seed=3) for _ in range(2))
    (pictures, values), taken = first.draw(4), second.take(4)
    assert [a.tobytes() for a in pictures] == [b.tobytes() for b, _ in taken]
    for (layout, *things), (_, scene) in zip(values.tolist(), taken, strict=True):
        named = [Thing(list(COLORS)[color], SHAPES[shape]) for color, shape in (things[:2], things[2:])]
        assert Scene(list(RELATIONS)[layout], *named) == scene
    few = captions.Scenes(pool, 5, seed=3)
    assert len({picture.tobytes() for picture, _ in few.take(200)}) == 5


def test_models_learn_on_no_scene_of_the_data_set_nor_on_held_out_ones(packer: train.Packer) -> None:
    task = captions.Task(captions.RECIPES["teacher"], seed=0)
    held, of_data = set(task.held.pool), {scene for name in ("train", "test") for scene in pools()[name]}
    assert len(held) == captions.HELD_OUT and not held & set(task.scenes.pool) and not of_data & {*task.scenes.pool}
    for _, asked in task.rows(packer, np.random.default_rng(0)):
        assert {read(text) for _, text in asked} <= set(task.scenes.pool)
        assert len({read(text) for _, text in asked}) == 1


def test_what_the_judge_is_to_say_follows_from_the_captions() -> None:
    maker, right = CaptionMaker(np.random.default_rng(0), "teacher"), {}
    for kind in maker.kinds:
        triples = [maker.triple(kind) for _ in range(60)]
        for triple in triples:
            said = maker.explanation(triple)
            assert said.endswith(f" <answer>{int(describes(triple.text, triple.reference))}</answer>")
            assert ("other" not in said and read(triple.text) is not None) == said.endswith("1</answer>")
        right[kind] = sum(describes(t.text, t.reference) for t in triples) / 60
    assert right.pop("same") == right.pop("sloppy") == 1
    assert max(right.values()) < 0.3
