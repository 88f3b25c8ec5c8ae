"""Decode images within limits, before a model or a processor sees them."""

import io
import warnings
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageOps

from masters.common.errors import one_line

MAX_BYTES = 64 << 20  # of an image file
MAX_PIXELS = 64_000_000  # decoded, 192 MB
MAX_ASPECT = 200  # long to short side; Qwen's image processors refuse more
# No PostScript, PDF or vector formats: decoding those runs programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000", "TGA", "ICO")
GRAY_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip these to white
TRANSPARENT_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
CACHE_SIZE = 4096  # images

Fault = tuple[str, object]  # (kind, detail)
_faults: dict[str, Fault | None] = {}  # cache by image digest: many questions share an image


def find_image_fault(data: bytes, digest: str) -> Fault | None:
    """Return (kind, detail) of what is wrong with an image, None if it decodes to RGB. `digest` is its SHA-256."""
    if digest not in _faults:
        if len(_faults) >= CACHE_SIZE:
            _faults.pop(next(iter(_faults)))  # the oldest
        _faults[digest] = _decode_fault(data)
    return _faults[digest]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to what models see: its first frame, upright, on white where transparent, 8 bits per channel.

    These are the pixels of vLLM's own loader, which serves the student later, with one exception: 16-bit gray keeps its
    upper 8 bits, as 16-bit color does in Pillow, while that loader clips nearly all samples to white. Raises ValueError
    for modes I and F, which do not define the value of white.
    """
    image.load()
    image = _apply_orientation(image)
    if image.mode in GRAY_16_BIT:
        return _gray_16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"samples of mode {image.mode} have no stated range; save it with 8 or 16 bits a channel")
    return _on_white(image) if _has_transparency(image) else image.convert("RGB")


def _gray_16_to_rgb(image: Image.Image) -> Image.Image:
    """Keep the upper 8 bits of each sample. A sample value that the file declares transparent becomes white."""
    samples = np.asarray(image)
    gray = (samples >> 8).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[samples == transparent] = 255
    return Image.fromarray(gray).convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    """Return whether pixels are transparent for vLLM's loader, which ignores a transparent color in RGB images."""
    return image.mode in TRANSPARENT_MODES or (image.mode != "RGB" and "transparency" in image.info)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency on white."""
    if image.mode == "La":  # Pillow converts gray with premultiplied alpha to no other mode
        image = image.convert("LA")
    with_alpha = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(with_alpha, mask=with_alpha.getchannel("A"))
    return canvas


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate and mirror an image as its EXIF orientation says, as viewers and Hugging Face's datasets do."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # viewers show an image with unreadable EXIF as it is stored
        return image
    if orientation not in range(2, 9):  # 1 is upright
        return image
    bare = image.copy()
    # exif_transpose would write the other tags again, and fail on odd ones
    bare.info = {name: value for name, value in image.info.items() if name == "transparency"}
    bare.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(bare)


def _decode_fault(data: bytes) -> Fault | None:
    """Decode the image in full, as training will, and return what is wrong with it."""
    if not data:
        return "image is empty", None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings about odd but readable files
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # for images inside, such as those of an icon
        try:
            with Image.open(io.BytesIO(data), formats=_supported_formats()) as image:
                # the size comes from the header: an image that is too large is never decoded
                return _size_fault(*image.size) or _size_fault(*to_rgb(image).size)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return "image has too many pixels", f"limit {MAX_PIXELS}"
        except Image.UnidentifiedImageError:
            return "image cannot be decoded", "no known format"
        except Exception as error:  # decoders raise anything
            return "image cannot be decoded", one_line(error, 200)


def _size_fault(width: int, height: int) -> Fault | None:
    if min(width, height) < 1:
        return "image has a side of zero", f"{width} x {height}"
    if width * height > MAX_PIXELS:
        return "image has too many pixels", f"{width} x {height}, limit {MAX_PIXELS}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return "image is too narrow", f"{width} x {height}, limit {MAX_ASPECT}:1"
    return None


@cache
def _supported_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this build of Pillow supports; `Image.open` accepts no other names."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
