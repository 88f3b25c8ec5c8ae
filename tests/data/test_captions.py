"""The drawn caption task: its split, its labels and its pictures."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from masters.config import Data
from masters.data.sources import captions, open_source


def test_captions_have_fixed_pictures_whose_label_is_their_scene():
    source = open_source(Data(source="captions"))
    rows = list(source.rows())
    assert Counter(row.split for row in rows) == {"train": 6_000, "test": 1_500}
    assert open_source(Data(source="captions")).digest() == source.digest()
    with Image.open(io.BytesIO(rows[0].image)) as picture:
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert len({row.image for row in rows}) == len({row.id for row in rows}) == 7_500
    by_caption = {scene.caption: (pool, scene) for pool, scenes in captions.pools().items() for scene in scenes}
    assert len(by_caption) == 1_104
    for row in rows:
        pool, scene = by_caption[row.answer]
        assert (pool, scene.layout) == (row.split, row.category)


def test_no_scene_is_in_two_pools():
    pools = {name: set(scenes) for name, scenes in captions.pools().items()}
    assert sum(map(len, pools.values())) == len(set.union(*pools.values())) == 1_104
    for name, share in captions.SHARES.items():
        assert len(pools[name]) / 1_104 == pytest.approx(share, abs=0.03)


def nearest_color(picture: Image.Image, x: float, y: float) -> str:
    """Return the color whose middle is nearest to the median around a place, which noise hardly moves."""
    part = np.asarray(picture)[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].reshape(-1, 3)
    away = {name: np.abs(np.median(part, 0) - middle).sum() for name, middle in captions.COLORS.items()}
    return min(away, key=away.__getitem__)


def test_a_picture_shows_its_scene():
    """Read back by another way than it was drawn: dark or colored blobs on the pale ground, their place and color."""
    rng = np.random.default_rng(0)
    scenes = [captions.pools()["test"][at] for at in rng.permutation(200)[:150]]
    right = 0
    for scene in scenes:
        picture = captions.picture_of(rng, scene)
        pixels = np.asarray(picture.filter(ImageFilter.MedianFilter(3))).astype(int)
        ground = np.median(pixels.reshape(-1, 3), 0)
        blobs, count = ndimage.label(np.abs(pixels - ground).max(2) > 60)
        sizes = ndimage.sum_labels(np.ones_like(blobs), blobs, range(1, count + 1))
        two = 1 + np.argsort(sizes)[-2:]
        centers = [(x, y) for y, x in ndimage.center_of_mass(blobs > 0, blobs, two)]
        axis = 0 if scene.layout == "row" else 1
        (first, second) = sorted(centers, key=lambda center: center[axis])
        assert abs(second[axis] - first[axis]) > abs(second[1 - axis] - first[1 - axis])
        right += sum(
            nearest_color(picture, *center) == thing.color
            for thing, center in ((scene.first, first), (scene.second, second))
        )
    assert right / (2 * len(scenes)) > 0.97
