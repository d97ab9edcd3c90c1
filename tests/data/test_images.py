"""The one image loader: what it accepts, how it brings it to upright 8-bit RGB, and what it says of the rest.

Fault numbers (F11...) are those of the project's fault table. Run: pytest tests/data/test_images.py
"""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from vlm_lora.data.example import ImageRef
from vlm_lora.data.images import image_size, load_image
from vlm_lora.errors import ConfigError, DataError


def encoded(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_of_size(width, height):
    """A PNG that only claims its size: nothing but the header is looked at before the size is checked."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def noise(mode="RGB", size=(40, 30)):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def corners(image):
    width, height = image.size
    return [image.getpixel(at) for at in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1))]


JPEG = encoded(noise(), "JPEG")
PNG = encoded(noise())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_f17_exif_orientation_is_applied_once(format, orientation):
    upright = Image.new("RGB", (48, 32), "white")
    for color, box in {"red": (0, 0, 24, 16), "lime": (24, 0, 48, 16), "blue": (0, 16, 24, 32)}.items():
        upright.paste(color, box)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the transposition that it undoes
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, format, exif=exif)
    image = load_image(data)
    assert image.size == image_size(data, "a") == (48, 32)
    for found, wanted in zip(corners(image), corners(upright), strict=True):
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 16
    assert load_image(image).tobytes() == image.tobytes()  # not rotated a second time
    assert not image.getexif()


def moved_to_the_end(png, *kinds):
    """The same PNG with its chunks of these kinds after the pixels, where Pillow finds them only by decoding."""
    chunks, at = [], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        chunks.append(png[at:end])
        at = end
    chunks.sort(key=lambda chunk: (chunk[4:8] == b"IEND", chunk[4:8] in kinds))
    return png[:8] + b"".join(chunks)


def test_the_size_of_a_png_is_known_without_decoding_it(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    turned = [encoded(noise(), exif=exif), encoded(noise(), pnginfo=xmp)]
    late = [moved_to_the_end(png, b"eXIf", b"iTXt") for png in turned]
    assert [load_image(png).size for png in (PNG, *turned, *late)] == [(40, 30), *4 * [(30, 40)]]
    assert [image_size(png, "a") for png in late] == 2 * [(30, 40)]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert [image_size(png, "a") for png in (PNG, *turned)] == [(40, 30), (30, 40), (30, 40)]


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_f17_an_orientation_that_does_not_exist_is_none(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (48, 32)), "JPEG", exif=exif)
    assert load_image(data).size == image_size(data, "a") == (48, 32)


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_f18_16_bit_gray_is_scaled_not_clipped(depth, format):
    ramp = np.linspace(0, 2**depth - 1, 64).astype(np.uint16).reshape(8, 8)
    image = load_image(encoded(Image.fromarray(ramp), format))
    expected = np.linspace(0, 255, 64).reshape(8, 8)
    assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 255), (-3, 3), (0, 70000), (5000, 9000)])
def test_f18_float_images_are_scaled_by_their_range(low, high):
    ramp = np.linspace(low, high, 64).astype(np.float32).reshape(8, 8)
    image = load_image(encoded(Image.fromarray(ramp), "TIFF"))
    gray = np.asarray(image)[..., 0]
    assert gray.max() == 255
    assert gray.min() == (0 if low <= 0 else round(low / high * 255) if high <= 255 else gray.min())
    assert len(np.unique(gray)) > 30


@pytest.mark.parametrize(("values", "gray"), [([0, 0.5, 1.0001], [0, 128, 255]), ([-0.02, 0.5, 1.08], [0, 128, 255])])
def test_f18_floats_a_little_beyond_their_range_do_not_turn_black(values, gray):
    image = load_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    assert np.asarray(image)[0, :, 0].tolist() == gray


def test_f18_float_images_with_nan_are_refused():
    values = np.full((4, 4), np.nan, dtype=np.float32)
    with pytest.raises(DataError, match="NaN or infinite pixel values"):
        load_image(encoded(Image.fromarray(values), "TIFF"))


def test_f19_transparency_is_composited_on_white():
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    for image in (
        rgba,
        Image.open(io.BytesIO(encoded(rgba))),
        Image.open(io.BytesIO(encoded(rgba, "WEBP", lossless=True))),
    ):
        left, right = (load_image(image).getpixel((x, 0)) for x in (0, 1))
        assert left == (255, 255, 255)
        assert right == pytest.approx((255, 127, 127), abs=1)
    assert load_image(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for format in ("PNG", "GIF"):
        image = load_image(encoded(palette, format, transparency=0))
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    keyed = load_image(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9)))
    assert keyed.getpixel((0, 0)) == (255, 255, 255)
    deep = load_image(encoded(Image.fromarray(np.array([[0, 300, 32768]], np.uint16)), transparency=300))
    assert [deep.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (128, 128, 128)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_f20_every_mode_becomes_rgb(mode):
    image = noise().convert("L").convert("RGB").convert("CMYK" if mode == "CMYK" else "RGB")
    if mode not in ("CMYK", "RGB"):
        image = Image.new(mode, (40, 30)) if mode == "LAB" else image.convert(mode)
    assert (load_image(image).mode, load_image(image).size) == ("RGB", (40, 30))


def test_f21_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert load_image(data).getpixel((1, 1)) == pytest.approx((255, 0, 0), abs=8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM", "QOI"])
def test_f12_f22_the_content_decides_not_the_extension(format, tmp_path):
    path = tmp_path / "picture.txt"
    path.write_bytes(encoded(noise(), format))
    image = load_image(ImageRef(path, "picture.txt"))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert load_image(path).tobytes() == load_image(path.read_bytes()).tobytes() == image.tobytes()


def test_f14_f15_one_pixel_and_any_ratio_are_images():
    for size in ((1, 1), (1, 201), (5000, 26), (1, 10000)):
        assert load_image(encoded(Image.new("L", size))).size == size


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            JPEG[: len(JPEG) // 2],
            "'a.jpg' is damaged or cut off .image file is truncated.*; copy or download it again",
        ),  # F11
        (PNG[: len(PNG) // 2], "'a.jpg' is damaged or cut off"),
        (encoded(noise(), "WEBP")[:200], "'a.jpg' is damaged or cut off"),
        (encoded(noise(), "AVIF")[:200], "'a.jpg' is (damaged or cut off|not an image)"),
        (b"", "'a.jpg' is empty .0 bytes."),  # F12
        (
            b"a caption",
            "'a.jpg' is not an image that can be read .it starts with b'a caption'.; expected AVIF",
        ),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "'a.jpg' is not an image",
        ),  # would run Ghostscript
        (
            png_of_size(8000, 8000),
            "'a.jpg' has 8000x8000 = 64 megapixels, the limit is 50; scale it down",
        ),  # F13
        (png_of_size(30000, 30000), "'a.jpg' has 900 megapixels, the limit is 50; scale it down"),
        (
            b'<?xml version="1.0"?>\n<svg xmlns="x"/>',
            "'a.jpg' is an SVG drawing, .* render it to PNG first",
        ),  # F22
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "'a.jpg' is (a HEIC/HEIF image; `pip install|damaged)"),
    ],
)
def test_what_is_no_whole_image_is_refused_by_name(data, message, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_image(ImageRef(path, "a.jpg"))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_f13_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="144 megapixels, the limit is 50"):
        load_image(png_of_size(12000, 12000))
    with pytest.raises(DataError, match="the limit is 0; scale it down"):
        load_image(PNG, max_decoded_pixels=1000)


def test_the_limit_can_be_raised(monkeypatch):
    picture = png_of_size(9000, 6000)  # 54 megapixels; it holds no pixels
    with pytest.raises(
        DataError, match="54 megapixels, the limit is 50; scale it down, or set VLM_LORA_MAX_MEGAPIXELS"
    ):
        image_size(picture, "a.png")
    monkeypatch.setenv("VLM_LORA_MAX_MEGAPIXELS", "61.5")
    assert image_size(picture, "a.png") == (9000, 6000)
    with pytest.raises(DataError, match="damaged"):  # so it was decoded
        load_image(picture)
    for wrong in ("many", "0", "nan", "200"):
        monkeypatch.setenv("VLM_LORA_MAX_MEGAPIXELS", wrong)
        with pytest.raises(
            ConfigError, match=f"VLM_LORA_MAX_MEGAPIXELS is '{wrong}'; expected megapixels, above 0 and"
        ):
            load_image(PNG)


def test_f13_f17_pillow_prints_no_warning_of_its_own(tmp_path):
    """A bomb, and EXIF data whose directory begins behind their end: the picture is whole, and stands as it is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (40, 30)), "JPEG", exif=exif)
    (tmp_path / "exif.jpg").write_bytes(data.replace(b"MM\0*\0\0\0\x08", b"MM\0*\0\0\0\xf0", 1))
    (tmp_path / "bomb.png").write_bytes(png_of_size(10500, 10000))
    code = "import sys; from pathlib import Path; from vlm_lora.check.images import look_at\n"
    code += "from vlm_lora.data.locate import Finder\n"
    code += "for name in ('bomb.png', 'exif.jpg'):\n"
    code += "    seen = look_at(Finder(Path(sys.argv[1]).resolve()).find(name)); print(seen.error, seen.size)"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "105 megapixels, the limit is 50" in ran.stdout
    assert "None (40, 30)" in ran.stdout
    assert ran.stderr == ""


def test_what_is_gone_or_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'a.png' cannot be opened: No such file"):
        load_image(ImageRef(tmp_path / "a.png", "a.png"))
    with pytest.raises(DataError, match="expected an image file"):
        load_image(ImageRef(tmp_path, "a.png"))


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", PNG[:33], JPEG[:40], b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0"]),
)
def test_random_bytes_raise_nothing_but_ours(data, start):
    assert outcome(start + data) in ("an image", "refused")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "QOI", "PPM"]), st.data())
def test_mutated_images_raise_nothing_but_ours(format, data):
    image = bytearray(encoded(noise(size=(12, 9)), format))
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    assert outcome(bytes(image[: data.draw(st.integers(1, len(image)))])) in ("an image", "refused")


def outcome(data: bytes) -> str:
    """Any other error than ours is the test's failure."""
    try:
        image = load_image(data, max_decoded_pixels=1_000_000)
    except DataError:
        return "refused"
    image.getpixel((0, 0))
    return "an image" if image.mode == "RGB" else image.mode
