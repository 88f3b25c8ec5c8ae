"""Image files that are broken, unusual, or not of the type that their name says."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def plain(mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> Image.Image:
    return Image.new(mode, size)


def noise(side: int = 40) -> Image.Image:
    return Image.effect_noise((side, side), 90)


def frames(count: int = 5) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(count)]


def gray16() -> np.ndarray:
    """Return pixels [10, 10] from black to nearly white."""
    return (np.arange(100).reshape(10, 10) * 655).astype(np.uint16)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int, *more: bytes) -> bytes:
    """Encode a PNG whose header states this size, without the pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def overwritten(picture: bytes) -> bytes:
    """Damage the data of an image but not its header."""
    return picture[:60] + b"\xff" * 40 + picture[100:]


def icon_with(picture: bytes) -> bytes:
    """Encode an icon whose directory states 16 x 16, with any image inside."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def text_bomb() -> bytes:
    """Encode a small PNG with a comment that decompresses to 64 MB."""
    return png_header(2, 2, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)))


def bomb() -> bytes:
    """Encode 169 million pixels in 20 kB."""
    return encoded(Image.new("1", (13_000, 13_000)))


def rgb16() -> bytes:
    """Encode a PNG of 2 x 2 pixels with 16 bits a channel."""
    rows = b"".join(b"\0" + struct.pack(">6H", 0, 30_000, 65_535, 1000, 2000, 3000) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def corners() -> np.ndarray:
    """Return pixels [4, 6, 3] that differ in all eight orientations, in a few distant colors."""
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[:2, :3], picture[:2, 3:], picture[2:, :3] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return picture


def stored_pixels(orientation: int) -> np.ndarray:
    """Return `corners` as a camera stores it with this EXIF orientation, by the standard and not by Pillow's code."""
    upright = corners()
    across, down, swapped = upright[:, ::-1], upright[::-1], upright.transpose(1, 0, 2)
    stored = {
        1: upright, 2: across, 3: upright[::-1, ::-1], 4: down, 5: swapped, 6: swapped[::-1], 7: swapped[::-1, ::-1],
        8: swapped[:, ::-1],
    }  # fmt: skip
    return stored[orientation]


def oriented(orientation: int, kind: str = "PNG") -> bytes:
    """Encode `corners` as a camera in this orientation stores it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "camera"
    options = dict(lossless=True) if kind == "WEBP" else {}
    return encoded(Image.fromarray(np.ascontiguousarray(stored_pixels(orientation))), kind, exif=exif, **options)


def odd_exif(orientation: int) -> bytes:
    """Encode `corners` with an orientation that does not exist."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(corners()), exif=exif)
