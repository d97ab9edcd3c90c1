"""What can be said without a look at the picture: the commonest answers. A model that beats no more has learnt no more.

A run keeps those of its training data beside its adapter, for `vlm-lora eval`; they are no part of the adapter.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm_lora.data.example import Dialogue, Example
from vlm_lora.errors import DataError
from vlm_lora.inference.tasks import task_of

FILE = "commonest.json"
OFTEN = 10
"""A question that training asked so many times has a commonest answer of its own."""
MOST_QUESTIONS = 1000
"""That are kept, the commonest."""


@dataclass(frozen=True, slots=True)
class Commonest:
    """The commonest answer of each task, of each type of question in it, and of each question that is asked often.

    ``source`` says of what: "training", or "the held-out data" where nothing is known about the training.
    """

    source: str
    of_task: dict[str, str]
    of_type: dict[str, dict[str, str]]
    of_question: dict[str, dict[str, str]]

    @classmethod
    def of(
        cls,
        examples: Iterable[Example],
        prompt: str,
        source: str,
        read: Callable[[Dialogue], Dialogue] = lambda dialogue: dialogue,
    ) -> "Commonest":
        """Of the last answers of all dialogues about images; ``prompt`` is the instruction for captions, ``read`` gives
        a dialogue with boxes as the model reads it (`Encoder.read`)."""
        said: dict[str, Counter[str]] = defaultdict(Counter)
        by_type: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        by_question: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for dialogue in (each for example in examples if example.images for each in example.dialogues):
            last = read(dialogue).turns[-1]
            task = task_of(dialogue, [last.assistant], prompt, boxes=dialogue.answers_with_boxes)
            said[task][last.assistant] += 1
            by_question[task, last.user][last.assistant] += 1
            if dialogue.kind:
                by_type[task, dialogue.kind][last.assistant] += 1
        times = {key: counts.total() for key, counts in by_question.items() if counts.total() >= OFTEN}
        asked = sorted(times, key=times.__getitem__, reverse=True)[:MOST_QUESTIONS]
        return cls(
            source,
            {task: _first(counts) for task, counts in said.items()},
            _nested({key: _first(counts) for key, counts in by_type.items()}),
            _nested({key: _first(by_question[key]) for key in asked}),
        )

    def guess(self, task: str, type: str | None, question: str) -> str | None:
        """The commonest answer to this question, else to those of its type, else of its task, if it is known."""
        general = self.of_task.get(task)
        by_type = self.of_type.get(task, {}).get(type or "", general)
        return self.of_question.get(task, {}).get(question, by_type)

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Commonest | None":
        """What `write` wrote; None where there is no such file, as in a run of an earlier version.

        Raises DataError for a file that is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); remove it: the commonest held-out answers then take its place"
            ) from error


def _first(counts: Counter[str]) -> str:
    """The commonest; of several the first in the alphabet, so that the order of the data does not matter."""
    most = max(counts.values())
    return min(text for text, count in counts.items() if count == most)


def _nested(answers: dict[tuple[str, str], str]) -> dict[str, dict[str, str]]:
    made: dict[str, dict[str, str]] = {}
    for (task, name), answer in answers.items():
        made.setdefault(task, {})[name] = answer
    return made


def commonest_of(texts: Sequence[str]) -> str:
    return _first(Counter(texts))
