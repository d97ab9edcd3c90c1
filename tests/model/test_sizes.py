"""Any picture from 1x1 to the extremes becomes patches within the pixel budget, known from its size.

Run: pytest tests/model/test_sizes.py
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import picture
from vlm_lora.errors import ModelError
from vlm_lora.model.preprocess import load_preprocessor

SIDES = st.one_of(st.integers(1, 300), st.integers(1, 50_000_000))


@pytest.fixture(scope="module")
def processors():
    """By limits: the embedded model's, and others with its 8-pixel patches."""
    limits = [(None, None), (256, 256), (300, 300), (50_176, 50_176), (1024, 1024 * 1024), (1, 3136)]
    return [load_preprocessor("tiny", min_pixels=least, max_pixels=most) for least, most in limits]


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES)
@example(5000, 26)
@example(26, 5000)
@example(1, 201)
@example(10_000, 1)
@example(50_000_000, 1)
@example(1, 1)
@example(300, 200)
def test_no_size_raises_or_overshoots_by_more_than_a_row_of_tokens(processors, width, height):
    for processor in processors:
        cell = processor.processor.image_processor.patch_size * processor.merge_size
        _, high, wide = processor.grid(width, height)
        most = processor.pixel_limits[1]
        assert high % processor.merge_size == wide % processor.merge_size == 0
        assert high * wide > 0
        area = (cell // processor.merge_size) ** 2 * high * wide
        assert area <= most + cell * (math.isqrt(most) + 1)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (64, 48), (5000, 26), (26, 5000), (1, 201), (10_000, 1), (3000, 2000), (200, 1), (401, 2)],
)
def test_the_grid_counted_from_the_size_is_the_one_that_preprocess_makes(processors, size):
    for processor in processors:
        pixels, grid = processor.preprocess([Image.new("RGB", size, "red")])
        assert tuple(grid[0].tolist()) == processor.grid(*size)
        assert len(pixels) == grid.prod()


def test_an_ordinary_picture_is_given_to_the_processor_as_it_is(processors):
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    for processor in processors:
        if processor._fit(300, 200)[2]:
            continue
        ours, _ = processor.preprocess([image])
        assert ours.equal(processor.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"])


def test_a_strip_stands_on_white_and_is_all_there(processors):
    strip = Image.new("RGB", (4000, 10), "black")
    wide, high, padded = processors[0]._fit(*strip.size)
    assert wide * high <= processors[0].pixel_limits[1]
    assert padded[0] == 4000
    pixels, _ = processors[0].preprocess([strip])
    assert pixels.max() > 1.9  # white, normalised
    assert pixels.min() < -1.4


def test_limits_that_no_token_fits_are_refused():
    with pytest.raises(ModelError, match="one token is 256"):
        load_preprocessor("tiny", max_pixels=255)
    with pytest.raises(ModelError, match="at least 5000 and at most 4000"):
        load_preprocessor("tiny", min_pixels=5000, max_pixels=4000)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9))
@example(300, 1, 0)
@example(64, 64, 0)
@example(1, 82, 0)
def test_resized_is_what_the_processor_resizes_to(processors, width, height, seed):
    """So that a server that is sent it finds nothing to resize, and shows the model the same pixels."""
    image = picture(seed, (width, height))
    for processor in processors:
        resized, wanted = processor.resized(image), processor.preprocess([image])
        assert torch.equal(processor.preprocess([resized]).pixel_values, wanted.pixel_values)
        assert processor.resized(resized) is resized
        size = tuple(8 * side for side in wanted.grid_thw[0].tolist()[:0:-1])
        if processor.grid(*size) == tuple(wanted.grid_thw[0].tolist()):  # no size stays as it is in limits too close
            assert resized.size == size
        else:
            # With the model's own limits there are such pictures too, but they are strips.
            assert processor is not processors[0] or max(image.size) > 80 * min(image.size)
