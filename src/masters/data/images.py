"""Whether image bytes can be used: decoded in full once, within limits, before a model or a processor sees them."""

import io
import warnings
from functools import cache

import numpy as np
from PIL import ExifTags, Image, ImageOps

MAX_BYTES = 64 << 20  # of one image file
MAX_PIXELS = 64_000_000  # decoded, 192 MB
MAX_ASPECT = 200  # long to short side; Qwen's image processors refuse more
# No PostScript, PDF or vector formats: decoding those runs programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "AVIF", "JPEG2000", "TGA", "ICO")
DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # 16 bits of gray; Pillow would make all but the darkest of it white
REMEMBERED = 4096

Fault = tuple[str, object]
_verdicts: dict[str, Fault | None] = {}  # by digest: many questions share an image


def image_fault(data: bytes, digest: str) -> Fault | None:
    """(kind, detail) of what is wrong with an image, None if it decodes to RGB. `digest` is its SHA-256."""
    if digest not in _verdicts:
        if len(_verdicts) >= REMEMBERED:
            _verdicts.pop(next(iter(_verdicts)))  # the oldest
        _verdicts[digest] = _examine(data)
    return _verdicts[digest]


def rgb(image: Image.Image) -> Image.Image:
    """The picture as models see it: the first frame, upright as its EXIF says, 8 bits a channel, of 16 bits the upper 8
    (as Pillow reads color).

    Raises ValueError where samples have no range that says what is white.
    """
    image.load()
    image = _upright(image)
    if image.mode in DEEP:
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"samples of mode {image.mode} have no stated range; save it with 8 or 16 bits a channel")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as cameras note it, which is how people and Hugging Face's data sets see it."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what cannot be read says nothing: viewers show such a picture as it is stored
        return image
    if orientation not in range(2, 9):  # 1: as it is stored
        return image
    bare = image.copy()
    bare.info = {}  # exif_transpose would write the other tags again, and stumble over odd ones
    bare.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(bare)


def _examine(data: bytes) -> Fault | None:
    if not data:
        return "image is empty", None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on odd but readable files
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # of what lies inside: an icon's pictures
        try:
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                # the header alone: nothing is decoded yet
                return _size_fault(*image.size) or _size_fault(*_decoded(image).size)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            return "image has too many pixels", f"limit {MAX_PIXELS}"
        except Exception as error:  # decoders raise what they like
            said = (
                "no known format"
                if isinstance(error, Image.UnidentifiedImageError)
                else " ".join(str(error).split())[:200]
            )
            return "image cannot be decoded", said


def _size_fault(width: int, height: int) -> Fault | None:
    if min(width, height) < 1:
        return "image has a side of zero", f"{width} x {height}"
    if width * height > MAX_PIXELS:
        return "image has too many pixels", f"{width} x {height}, limit {MAX_PIXELS}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return "image is too narrow", f"{width} x {height}, limit {MAX_ASPECT}:1"
    return None


def _decoded(image: Image.Image) -> Image.Image:
    """Decode in full, as training will: frames, depths, palettes and CMYK are fine if they convert. Raises if not."""
    return rgb(image)


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has; it takes no unknown name."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
