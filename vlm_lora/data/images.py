"""One image loader for training, evaluation, captioning and the demo: bytes in, a checked RGB image out.

Content decides, not the extension. Knows nothing of data formats and models: resizing for one is `encode`'s.
"""

import hashlib
import io
import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlm_lora.data.example import ImageRef, read_regular_file
from vlm_lora.errors import ConfigError, DataError

# What Pillow warns of, damaged EXIF data mostly, leaves the picture as it is, and names no file
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # the limit below is asked for each image
MAX_MEGAPIXELS = 50.0  # a 17 KB PNG can be 144 megapixels and 430 MB when decoded
MOST_MEGAPIXELS = 178.0  # where Pillow itself refuses
LIMIT_VARIABLE = "VLM_LORA_MAX_MEGAPIXELS"

# An explicit list: among the rest of Pillow's formats are some that run other programs (EPS calls
# Ghostscript) and some without a signature (TGA takes arbitrary bytes for a picture).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
IMAGE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jpeg", "jpg"),
        *("pbm", "pgm", "png", "ppm", "qoi", "svg", "tif", "tiff", "webp"),
    )
)

SEVERAL_FRAMES = "several_frames"
_UPRIGHT = {  # EXIF orientation -> what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_EXIF_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""One of these is in each chunk of a PNG that can say how it is turned; the chunk may come after the pixels."""


def content_hash(data: bytes) -> str:
    """SHA-256 of the encoded bytes, hex."""
    return hashlib.sha256(data).hexdigest()


def decoding_limit() -> int:
    """Pixels of the largest image that is decoded: ``$VLM_LORA_MAX_MEGAPIXELS`` million, else 50 million."""
    text = os.environ.get(LIMIT_VARIABLE, str(MAX_MEGAPIXELS))
    with suppress(ValueError):
        if 0 < float(text) <= MOST_MEGAPIXELS:
            return int(float(text) * 1e6)
    raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}; expected megapixels, above 0 and up to {MOST_MEGAPIXELS:g}.")


def load_image(
    source: ImageRef | Path | str | bytes | Image.Image,
    *,
    name: str | None = None,
    max_decoded_pixels: int | None = None,
) -> Image.Image:
    """Load an image as RGB, turned upright, without metadata (or another tool would turn it again).

    Transparent pixels are put on white. 16-bit and float images are scaled to 8 bits. Of an animation the first frame
    is taken, and the image's ``info`` says so.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an `ImageRef`.
        name: what to call bytes in messages.
        max_decoded_pixels: larger images are refused before they are decoded; by default 50 million pixels, or
            ``$VLM_LORA_MAX_MEGAPIXELS`` million.

    Returns:
        An RGB image of (width, height) pixels, 1x1 or larger.

    Raises:
        DataError: it is no image, damaged, cut off, or too large. The message names it.
    """
    max_decoded_pixels = max_decoded_pixels or decoding_limit()
    if isinstance(source, Image.Image):
        return _decode(source, getattr(source, "filename", "") or "the image", max_decoded_pixels)
    if isinstance(source, bytes):
        return _open(source, repr(name) if name else f"the image ({len(source):,} bytes)", max_decoded_pixels)
    if isinstance(source, ImageRef):
        return _open(source.read_bytes(), repr(source.name), max_decoded_pixels)
    return _open(read_regular_file(Path(source), str(source)), repr(str(source)), max_decoded_pixels)


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height that `load_image` gives for these encoded bytes, from their header; hardly anything is decoded.

    Raises DataError for what is no image, or too large a one. Damage after the header goes unnoticed.
    """
    exif_follows = any(data.find(mark, max(0, data.find(b"IDAT"))) >= 0 for mark in _EXIF_MARKS)
    return _open(data, repr(name), decoding_limit(), partial(_measure, exif_follows=exif_follows))


def _open(data: bytes, name: str, limit: int, take: Callable[[Image.Image, str, int], Any] | None = None) -> Any:
    """What ``take`` makes of the opened image; by default it is decoded."""
    formats = FORMATS
    if not data:
        raise DataError(f"{name} is empty (0 bytes); copy or download it again")
    head = data[:65536].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in head:
        raise DataError(f"{name} is an SVG drawing, which has no pixels; render it to PNG first")
    if data[4:8] == b"ftyp" and b"avi" not in data[8:32] and re.search(rb"hei[cxm]|hev[cx]|mif1", data[8:32]):
        _register_heif(name)
        formats = (*FORMATS, "HEIF")
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            return (take or _decode)(image, name, limit)
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not an image that can be read (it starts with {data[:12]!r}); expected " + ", ".join(FORMATS)
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own check
        pixels = re.findall(r"\d+", str(error))[0]
        raise _too_large(name, f"{int(pixels) / 1e6:,.0f}", limit) from None
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything for damaged bytes
        raise _damaged(name, error) from error


def _check_size(image: Image.Image, name: str, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise _too_large(name, f"{width}x{height} = {width * height / 1e6:,.0f}", limit)
    if width * height == 0:
        raise DataError(f"{name} has no pixels ({width}x{height})")


def _measure(image: Image.Image, name: str, limit: int, *, exif_follows: bool) -> tuple[int, int]:
    _check_size(image, name, limit)
    # A TIFF is turned upright, and its orientation forgotten, while it is decoded
    if image.format == "TIFF" or (image.format == "PNG" and exif_follows):
        return _decode(image, name, limit).size
    width, height = image.size
    return (height, width) if _orientation(image) in (5, 6, 7, 8) else (width, height)


def _decode(image: Image.Image, name: str, limit: int) -> Image.Image:
    _check_size(image, name, limit)
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image, name)
    except DataError:
        raise
    except Exception as error:
        raise _damaged(name, error) from error
    rgb = rgb.transpose(turn) if turn is not None else rgb
    rgb.info = {SEVERAL_FRAMES: True} if _has_several_frames(image) else {}
    return rgb


def _has_several_frames(image: Image.Image) -> bool:
    with suppress(Exception):  # damage after the frame that was read does not matter
        return bool(getattr(image, "is_animated", False))
    return False


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8. Damaged metadata is no damaged picture: it counts as upright, as in browsers."""
    with suppress(Exception):
        return Image.Image.getexif(image).get(_ORIENTATION, 1)  # a PNG's own getexif decodes all of it
    return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    # .convert() would clip these: white 16-bit and black float images
    if image.mode == "F" or image.mode.startswith("I"):
        return _to_8_bits(image, name).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Gray of 16 or 32 bits or floats -> "L".

    Integers are on the scale of the smallest usual depth (8, 10, 12, 14, 16 bits) that holds their maximum: a
    12-bit scan in a 16-bit file is not black. Floats within 0..1 or 0..255, or a tenth beyond, as resampling
    leaves them, are on that scale. Whatever lies outside of these scales is stretched from its minimum to its maximum.
    """
    import numpy as np

    values = np.asarray(image.convert("I") if image.mode.startswith("I;") else image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds NaN or infinite pixel values; write it with finite ones")
    clear = values == image.info.get("transparency")  # PNG's one gray that is none, where it has no alpha
    low, high = float(values.min()), float(values.max())
    tops = (1.0, 255.0) if image.mode == "F" else (255.0, 1023.0, 4095.0, 16383.0, 65535.0)
    spare = 0.1 if image.mode == "F" else 0.0
    top = next((top for top in tops if high <= top * (1 + spare)), None)
    if top is None or low < -spare * high:
        values, top = values - low, (high - low) or 1.0
    values = values.clip(0, top)
    pixels = np.rint(values * (255.0 / top)).astype(np.uint8)
    return Image.fromarray(np.where(clear, np.uint8(255), pixels))


def _register_heif(name: str) -> None:
    try:
        import_module("pillow_heif").register_heif_opener()
    except ImportError:
        raise DataError(
            f"{name} is a HEIC/HEIF image; `pip install pillow-heif` to read it, or save it as JPEG"
        ) from None


def _too_large(name: str, megapixels: str, limit: int) -> DataError:
    more = f", or set {LIMIT_VARIABLE} (up to {MOST_MEGAPIXELS:g})"
    return DataError(f"{name} has {megapixels} megapixels, the limit is {limit / 1e6:,.0f}; scale it down{more}")


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(f"{name} is damaged or cut off ({error or type(error).__name__}); copy or download it again")
