"""What becomes of each field of a row: something takes it up, or it is named as unused, or it makes the row bad.

A field that says what the model is to see or to learn, and that nothing takes up, makes its row bad: the row would be
learnt as something else than it is. Any other one that nothing takes up is counted, and named once.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_lora.data.example import BBOX, REF, Dialogue, ImageRef
from vlm_lora.errors import DataError

_GROUPS = {
    "moving pictures and sound are not learnt from": "video videos audio audios speech mp4 mov avi mkv wav mp3 flac",
    "a part of the picture is meant, and the whole picture would be learnt": (
        "bbox bboxes box boxes points crop crops region regions segmentation segments mask masks objects"
    ),
    "calls of tools are not learnt": "tools tool_calls functions function_call",
    "it belongs to the question, and nothing asks with it": "context passage hint choices options candidates",
    "it says what to prefer, which is another kind of training": "chosen rejected rejected_response rejected_messages",
    "it says what of the answer is learnt, and is not understood": (
        "loss loss_scale train training train_detail weight weights"
    ),
    "it is thought before the answer, and would not be learnt": "reasoning_content thinking reasoning_details",
    "it sets a size for this image alone": "min_pixels max_pixels resized_height resized_width",
}
MEANT = {name: why for why, names in _GROUPS.items() for name in names.split()}
"""Names of fields that say what is seen or learnt, and what is wrong where nothing takes them up."""
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),  # restval: Karpathy's COCO, trained on by all
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What people write for the part of the data that a row belongs to."""
_LIKE_SPLIT = ("set", "subset", "partition", "fold", "phase", "part")
_TALK = {"question", "answer", "messages", "conversations", "caption", "captions", "query", "response"}

MARKS = re.compile(
    r"<(?:image|video|audio|bbox|ref-object)>|<img>.*?</img>|<\|image_\d+\|>"
    r"|<\|(?:image|video|vision)_pad\|>|<\|(?:vision|box|quad|object_ref)_(?:start|end)\|>"
)
"""Stand-ins that tools put into texts for what is beside them."""
_NO_TEXT = re.compile(r"nan|<na>|null", re.IGNORECASE)


class Fields(dict):
    """The fields of a row, or of a message in it, and which of them something has taken up.

    ``row[name]`` and ``row.get(name)`` only look; `take` is what says that a field has its effect.
    """

    def __init__(self, values: Mapping[str, Any], ignored: frozenset[str] = frozenset()):
        super().__init__({name: value for name, value in values.items() if name not in ignored})
        self.taken: set[str] = set()

    def take(self, name: str | None) -> Any:
        if name is None:
            return None
        self.taken.add(name)
        return self.get(name)

    def left(self, whose: str = "", has_images: bool = True) -> Iterator[str]:
        """The names of those that nothing has taken up; null and empty ones are no fields.

        Raises DataError for one that says what is seen or learnt. Without images, a name of one is such too.
        """
        for name, value in self.items():
            if name in self.taken or value is None or value in ("", [], {}):
                continue
            if why := _meaning(str(name), value, has_images):
                raise DataError(
                    f"has a field {name!r}{whose and f' in {whose}'} that is not used here: {why}; "
                    f"take it out, or give --ignore-columns {name} to read the rows without it"
                )
            yield str(name)


def _meaning(name: str, value: object, has_images: bool) -> str:
    """What would be wrong with passing over this field; "" if nothing."""
    if name.lower() in MEANT:
        return MEANT[name.lower()]
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, ImageRef):
        return "it holds an image (--columns image=NAME says which one is meant)"
    if not has_images and isinstance(first, str) and re.search(r"\.(?:jpe?g|png|webp|gif|bmp|tiff?)$", first, re.I):
        return "it names an image (--columns image=NAME says so), and no other is there"
    if isinstance(first, dict) and _TALK & first.keys():
        return "questions and answers are inside of it (write each as a row)"
    if name.lower() in _LIKE_SPLIT and str(value).lower() in SPLITS and SPLITS[str(value).lower()] != "train":
        return f"it says {value!r}, and the row would be trained on (--columns split={name} keeps it out)"
    return ""


@dataclass(frozen=True, slots=True)
class Ledger:
    """The fields of a data set's rows that nothing took up."""

    ignored: frozenset[str] = frozenset()
    """Names of fields that are passed over as if they were not there."""
    unused: Counter[str] = field(default_factory=Counter)
    """How many rows have each."""

    def fields(self, values: Mapping[str, Any]) -> Fields:
        return Fields(values, self.ignored)

    def close(self, fields: Fields, whose: str = "", has_images: bool = True) -> None:
        """Count what is left of these fields. Raises DataError for what may not be left."""
        self.unused.update(list(fields.left(whose, has_images)))


def split_of(value: object) -> str:
    """One of "train", "val" and "test". Raises DataError for anything else."""
    found = SPLITS.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise DataError(
            f"its split is {value!r}; expected train, val or test: correct it, or read the rows without it: "
            "--ignore-columns"
        )
    return found


def require_plain(dialogue: Dialogue) -> None:
    """Raises DataError for a text with a mark of another tool in it, which would be learnt as the letters it is."""
    texts = [text for turn in dialogue.turns for text in (turn.user, turn.assistant)]
    if dialogue.has_marks:  # of which there are as many as refs and boxes
        texts = [text.replace(REF, "").replace(BBOX, "") for text in texts]
    for text in (dialogue.system, *texts, *dialogue.accepted, *dialogue.refs):
        if mark := MARKS.search(text):
            raise DataError(
                f"has {mark[0][:60]!r} in a text, and nothing that goes with it: it would be learnt as these letters; "
                "take it out, or say --text-as-is if it is meant so"
            )
    for turn in dialogue.turns:
        if _NO_TEXT.fullmatch(turn.assistant.strip()):
            raise DataError(
                f"the text to learn is {turn.assistant.strip()!r}, as programs write where there is none; "
                "write one, or say --text-as-is if it is meant so"
            )
