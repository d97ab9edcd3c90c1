"""How a step is cut into rows and micro-batches.

Run: pytest tests/training/test_batches.py
"""

import pytest

from vlm_lora.data.example import Example
from vlm_lora.training.batches import deal, micro_batches, padded, split_long
from vlm_lora.training.lessons import BranchSize, Lesson


def lesson(prefix: int, *branches: int) -> Lesson:
    sizes = tuple(BranchSize(number, tokens, 1, 0) for number, tokens in enumerate(branches))
    return Lesson(Example("x", (), (), "x.jsonl"), prefix, 0, sizes)


@pytest.mark.parametrize(
    ("max_tokens", "rows"),
    [
        (50, [[0, 1, 2, 3]]),
        (49, [[0, 1, 2], [3]]),
        (40, [[0, 1, 2], [3]]),  # a row may be as long as that
        (39, [[0, 1], [2, 3]]),
        (30, [[0, 1], [2, 3]]),
        (29, [[0], [1], [2], [3]]),
        (5, [[0], [1], [2], [3]]),  # never cut
    ],
)
def test_each_row_of_a_long_example_has_its_prefix_and_what_fits(max_tokens, rows):
    whole = lesson(10, 10, 10, 10, 10)
    parts = split_long(whole, max_tokens)
    assert [[branch.number for branch in part.branches] for part in parts] == rows
    assert all(part.prefix == 10 for part in parts)


def test_micro_batches_are_of_like_rows_and_as_large_as_fits_with_padding():
    rows = [lesson(5, n) for n in (5, 25, 6, 24, 95)]
    groups = micro_batches(rows, 60)
    assert [[row.num_tokens for row in group] for group in groups] == [[100], [30, 29], [11, 10]]
    assert [padded(group) for group in groups] == [100, 60, 22]
    mixed = [lesson(prefix, after) for prefix, after in ((40, 2), (3, 38), (20, 20), (1, 1))]
    assert [len(group) for group in micro_batches(mixed, 155)] == [1, 2, 1]  # 40 and 38 do not go into 2 x 42 tokens
    assert [len(group) for group in micro_batches(mixed, 156)] == [2, 2]
    assert [len(group) for group in micro_batches(rows, 59)] == [1, 1, 2, 1]


def test_the_longest_first_each_to_whom_has_least():
    assert deal([5, 9, 1, 8, 2], 2) == [[1, 4, 2], [3, 0]]
