"""Which answers make up which step.

Run: pytest tests/training/test_schedule.py
"""

from dataclasses import replace

import pytest

from vlm_lora.config import TrainConfig
from vlm_lora.data.example import Dialogue, Example, Turn
from vlm_lora.training.prepare import sees_each_image_once
from vlm_lora.training.schedule import Schedule


def test_the_schedule_shows_every_answer_once_an_epoch():
    schedule = Schedule([5, 1, 10, 3], batch_size=4, epochs=3, seed=0)
    seen = [(e, d) for step in range(schedule.num_steps) for e, dialogues in schedule.step(step) for d in dialogues]
    everything = {(e, d) for e, n in enumerate(schedule.num_answers) for d in range(n)}
    for epoch in range(3):
        assert set(seen[epoch * 19 : epoch * 19 + 19]) == everything
    assert len(seen) == 57
    sizes = [sum(len(d) for _, d in schedule.step(s)) for s in range(schedule.num_steps)]
    assert min(sizes) >= 1
    assert max(sizes) <= 8
    assert abs(schedule.num_steps - 57 / 4) <= 1
    again = Schedule([5, 1, 10, 3], batch_size=4, epochs=3, seed=0)
    assert again.step(9) == schedule.step(9)  # asked for alone, out of order
    assert Schedule([5, 1, 10, 3], batch_size=4, epochs=3, seed=1).step(0) != schedule.step(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("numbers", "batch_size", "epochs"), [
    ([5] * 16, 16, 3), ([10] * 7, 16, 2.5), ([1] * 30, 8, 1), ([3, 8, 1, 40, 2, 16, 5], 16, 4), ([2, 2], 16, 9),
])  # fmt: skip
def test_an_image_stays_in_one_step_where_it_fits(numbers, batch_size, epochs, seed):
    schedule = Schedule(numbers, batch_size=batch_size, epochs=epochs, seed=seed)
    steps = [schedule.step(step) for step in range(schedule.num_steps)]
    assert all(steps)
    assert schedule.step(schedule.num_steps) == []
    assert sum(len(dialogues) for step in steps for _, dialogues in step) == round(sum(numbers) * epochs)
    for step in steps:
        assert sum(len(dialogues) for _, dialogues in step) < 2 * batch_size
    # Multiples, as an image may be the last of an epoch and the first of the next; half an epoch may end within one.
    for e, dialogues in (piece for step in steps[:-1] for piece in step):
        assert numbers[e] > batch_size or len(dialogues) % numbers[e] == 0


def test_an_image_goes_to_the_step_that_has_the_middle_of_its_answers():
    """Found anew from the line that the steps make together; a larger one than a step is cut where steps end."""
    numbers, batch_size = [3, 8, 1, 40, 2, 16, 5], 16
    for seed in range(20):
        schedule = Schedule(numbers, batch_size=batch_size, epochs=1, seed=seed)
        line = [
            (example, step)
            for step in range(schedule.num_steps)
            for example, dialogues in schedule.step(step)
            for _ in dialogues
        ]
        place = 0
        while place < len(line):
            example, number = line[place][0], numbers[line[place][0]]
            if number <= batch_size:
                middle = place + (number - 1) // 2
                assert line[place : place + number] == [(example, middle // batch_size)] * number
            else:
                assert [step for _, step in line[place : place + number]] == [
                    at // batch_size for at in range(place, place + number)
                ]
            place += number


def test_every_epoch_has_an_order_of_its_own_of_images_and_of_their_answers():
    schedule = Schedule([6] * 8, batch_size=6, epochs=3, seed=0)
    epochs = [[schedule.step(step)[0] for step in range(8 * epoch, 8 * epoch + 8)] for epoch in range(3)]
    assert len({tuple(example for example, _ in epoch) for epoch in epochs}) == 3
    assert len({dict(epoch)[0] for epoch in epochs}) > 1
    assert len({dialogues for _, dialogues in epochs[0]}) > 1


@pytest.mark.parametrize(
    ("changes", "once"),
    [
        ({"epochs": 1}, True),
        ({"epochs": 1.1}, False),
        ({"epochs": 3, "max_steps": 3, "batch_size": 4}, True),
        ({"epochs": 3, "max_steps": 2, "batch_size": 7}, False),
        ({"epochs": 3, "max_steps": 13, "batch_size": 1}, False),
    ],
)
def test_whether_a_run_sees_an_image_twice_follows_from_its_steps(changes, once):
    """Of twelve answers about four images."""
    answer = Dialogue((Turn("Q", "A"),))
    examples = [Example(str(i), (), (answer,) * 3, "x.jsonl") for i in range(4)]
    config = TrainConfig(data="x", **changes)
    assert sees_each_image_once(config, examples) == once
    assert not sees_each_image_once(config, [*examples[1:], replace(examples[0], weight=2)])
