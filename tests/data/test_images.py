"""Transparent images: composited on white, with the pixels of the loader that serves the student later."""

import io
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import ExifTags, Image

from masters.data.images import to_rgb
from masters.models.prompts import open_image
from tests.bad_input.image_files import encoded, gray16
from tests.fork_server.call import call_in_process

CONTAINERS = ("PNG", "WEBP", "GIF", "TIFF", "ICO", "TGA", "JPEG2000", "AVIF", "BMP")
MODES = ("RGBA", "LA", "PA", "P", "L", "RGB", "1", "CMYK")
TRANSPARENCY = {"P": (0, bytes([0, 128, 255])), "L": (0, 90), "RGB": ((200, 30, 40),), "1": (0, 255)}  # in the file


def picture() -> Image.Image:
    """Draw 16 x 24 pixels: a colored bar that is opaque, half transparent and transparent, and much that is black."""
    pixels = np.zeros((16, 24, 4), np.uint8)
    pixels[4:12, :] = (200, 30, 40, 255)
    pixels[:, :8, 3], pixels[:, 8:16, 3], pixels[:, 16:, 3] = 255, 128, 0
    return Image.fromarray(pixels, "RGBA")


def corpus() -> Iterator[tuple[str, bytes]]:
    """Yield (name, file) of every mode that Pillow can write to a container, with every kind of transparency."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for container in CONTAINERS:
        for mode in MODES:
            converted = picture().convert(mode) if mode != "CMYK" else picture().convert("RGB").convert(mode)
            variants = [{}, {"exif": exif}, *({"transparency": value} for value in TRANSPARENCY.get(mode, ()))]
            for options in [*variants, *({**variant, "exif": exif} for variant in variants[2:])]:
                try:
                    yield f"{container} {mode} {options}", encoded(converted, container, **options)
                except (OSError, ValueError, TypeError):  # a container that cannot hold this
                    continue


def serving_pixels(files: list[bytes]) -> list[np.ndarray]:
    """Return the pixels that vLLM's server decodes from image files that a client sends."""
    from vllm.multimodal.media.image import ImageMediaIO

    loader = ImageMediaIO()
    return [np.asarray(loader.load_bytes(file).media) for file in files]


def test_training_and_serving_see_the_same_pixels() -> None:
    files = dict(corpus())
    assert len(files) > 100
    different = [
        name
        for (name, file), expected in zip(
            files.items(), call_in_process(serving_pixels, [*files.values()]), strict=True
        )
        if not np.array_equal(np.asarray(open_image(file)), expected)
    ]
    assert different == []


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La", "P"])
def test_transparent_pixels_are_composited_on_white(mode: str) -> None:
    unpacked = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
    image = picture().convert(unpacked).convert(mode)
    if mode == "P":  # only in a file is a color of the palette transparent
        image = Image.open(io.BytesIO(encoded(image)))
    expanded = np.asarray(image.convert(unpacked).convert("RGBA")).astype(float)
    colors, alpha = expanded[:, :, :3], expanded[:, :, 3:] / 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(to_rgb(image)).astype(float)
    assert np.abs(found - (colors * alpha + 255 * (1 - alpha))).max() <= 2
    assert len({tuple(color) for row in found for color in row}) >= 4, "not one color"
    if mode not in ("P", "PA"):  # whose palette has few colors
        assert (found[:, 16:] == 255).all() and (found[0, :8] == 0).all() and (abs(found[0, 8:16] - 127) <= 1).all()


def test_a_transparent_color_of_an_rgb_file_is_kept() -> None:
    file = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert np.asarray(open_image(file))[0, 0].tolist() == [1, 2, 3]


def test_the_transparent_sample_of_16_bit_gray_becomes_white() -> None:
    samples = gray16()
    found = np.asarray(open_image(encoded(Image.fromarray(samples), transparency=int(samples[0, 3]))))[:, :, 0]
    assert np.array_equal(found, np.where(samples == samples[0, 3], 255, samples >> 8))


def test_opaque_pixels_do_not_change() -> None:
    """Identical to a plain conversion: what was trained on images without transparency stays as it was."""
    noise = Image.effect_noise((40, 30), 90)
    for mode in ("RGB", "L", "P", "1", "CMYK", "YCbCr"):
        image = noise.convert("RGB").convert(mode)
        assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()
    opened = Image.open(io.BytesIO(encoded(noise.convert("RGB"))))
    assert to_rgb(opened).tobytes() == noise.convert("RGB").tobytes()
