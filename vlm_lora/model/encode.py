"""An example and its image grids in tokens: the shared prefix, and a branch for each dialogue.

The model's own chat template decides the text; this module finds out by rendering it where images and answers stand,
and which tokens may be learnt. The prefix is whatever all dialogues begin with: the images, and the instruction too
where, as with captions, it is the same for all.
"""

import hashlib
import re
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from vlm_lora.data.example import Dialogue, Example, Turn
from vlm_lora.data.readers import BadRow
from vlm_lora.errors import ModelError
from vlm_lora.model import boxes
from vlm_lora.model.boxes import TOKEN, TOKENS, as_decoded, rendered
from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded, mrope_positions
from vlm_lora.model.preprocess import Preprocessor

# Stand-ins for users' texts while the template is rendered: private-use characters no template contains.
USER_TEXT, ANSWER_TEXT, SYSTEM_TEXT = TEXTS = ("\ue000", "\ue001", "\ue002")

AT_ONCE = 256
"""Examples whose texts are tokenised together where all are to be, by `Encoder.tokenize_ahead`."""


class Sizes(NamedTuple):
    """How many tokens an `Encoded` has, without them."""

    prefix: int
    images_in_prefix: int
    branches: list[tuple[int, int, int]]
    """Of each its tokens, those of them that carry loss, and its images."""

    @property
    def longest_sequence(self) -> int:
        """Tokens of the prefix and the longest branch."""
        return self.prefix + max(tokens for tokens, _, _ in self.branches)


class _Conversation(NamedTuple):
    """Tokens of a conversation, one placeholder an image, their labels, and what the loss of each is multiplied by."""

    ids: list[int]
    labels: list[int]
    weights: list[float]


class Encoder:
    """Turns dialogues about images into tokens for one base model.

    ``num_prompt_tokens`` tokens, -1, -2 and so on, begin each prefix; by default as many as the backbone has vectors.
    """

    def __init__(self, backbone: Preprocessor, num_prompt_tokens: int | None = None):
        self.backbone = backbone
        self.num_prompt_tokens = num_prompt_tokens
        self.processor = backbone.processor
        self.tokenizer = backbone.tokenizer
        self.image_token_id = backbone.image_token_id
        self.merge_size = backbone.merge_size
        self._skeleton = lru_cache(maxsize=None)(self._render_skeleton)
        self._ahead: dict[str, tuple[int, ...]] = {}
        self._text_ids = lru_cache(maxsize=2**13)(self._tokenize_text)  # questions and answers come again and again
        self._lock = threading.Lock()  # a tokenizer of two threads at a time says "Already borrowed"

    def encode(self, dialogues: Sequence[Dialogue], image_grid_thw: torch.Tensor) -> Encoded:
        """Prefix and one branch a dialogue, or, where `_answers_apart`, one for each of its answers; labels are the
        answers' tokens and the end-of-turn token after each.

        Args:
            image_grid_thw: ``(num_images, 3)``; no rows for an example of text only.
        """
        return self._encode(self._conversations(dialogues, len(image_grid_thw)), image_grid_thw)

    def sizes(self, dialogues: Sequence[Dialogue], image_grid_thw: torch.Tensor) -> Sizes:
        """Of what `encode` gives for the same, in a third of the time."""
        conversations = self._conversations(dialogues, len(image_grid_thw))
        cut, first, counts = self._cut(conversations, image_grid_thw)
        branches = []
        for ids, labels, _ in conversations:
            num_images = ids.count(self.image_token_id) - first
            tokens = len(ids) - cut - num_images + sum(counts[first : first + num_images])
            branches.append((tokens, len(labels) - labels.count(IGNORE_INDEX), num_images))
        return Sizes(self._num_vectors + cut - first + sum(counts[:first]), first, branches)

    def fitting(
        self, example: Example, image_grid_thw: torch.Tensor, max_tokens: int, sizes: Sizes | None = None
    ) -> tuple[Example | None, Sizes, list[BadRow]]:
        """The example with those of its dialogues that fit into ``max_tokens``, its sizes, and the rows of the others.

        None instead of the example where nothing of it fits. ``image_grid_thw`` ``(num_images, 3)``; ``sizes`` where
        those of the whole example are known.
        """
        sizes = sizes or self.sizes(example.dialogues, image_grid_thw)
        if sizes.longest_sequence <= max_tokens:
            return example, sizes, []
        fit, bad = [], []
        lengths = iter([tokens for tokens, _, _ in sizes.branches])
        for dialogue in example.dialogues:
            if (needed := sizes.prefix + max(next(lengths) for _ in self._ends(dialogue))) <= max_tokens:
                fit.append(dialogue)
                continue
            reason = (
                f"needs {needed} tokens, {sizes.prefix} of them for images and instruction; --max-tokens is "
                f"{max_tokens}. Shorten its text, lower --max-pixels or raise --max-tokens"
            )
            bad.append(BadRow(dialogue.source, dialogue.line, reason))
        if not fit:
            return None, sizes, bad
        return replace(example, dialogues=tuple(fit)), self.sizes(fit, image_grid_thw), bad

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides how many tokens a text, or a picture of some size, has."""
        code = [Path(module.__file__ or "").read_bytes() for module in (sys.modules[__name__], boxes)]
        image_processor, template = self.processor.image_processor, self.processor.chat_template
        numbers = self.merge_size, image_processor.patch_size, self.backbone.pixel_limits, self._num_vectors
        family, vocabulary = self.backbone.family, self.tokenizer.backend_tokenizer.to_str()
        decide = (code, transformers.__version__, template, numbers, family.template_options, family.boxes, vocabulary)
        return hashlib.sha256(repr(decide).encode()).hexdigest()

    def tokenize_ahead(self, examples: Sequence[Example]) -> None:
        """Tokenise the texts of these examples together, on all cores, for the `encode` of each that follows."""
        texts = {text for e in examples for d in e.dialogues for turn in d.turns for text in _said(turn)}
        ordered = sorted(texts)
        self._ahead = dict(zip(ordered, map(tuple, self._tokenize(ordered)), strict=True)) if ordered else {}

    def encode_requests(
        self, requests: Sequence[Dialogue], image_grid_thw: torch.Tensor, begun: str = ""
    ) -> list[Encoded]:
        """Prefix and one branch a request, each ending where the model is to answer its last turn, or to go on with
        the answer ``begun``; no labels.

        Images are in prefixes only: where they stand after what differs, each request has a prefix of its own.
        """
        answer = list(self.tokenize(begun))
        asked = []
        for request in requests:
            ids = self._tokens(request, len(image_grid_thw), without_last_answer=True).ids + answer
            asked.append(_Conversation(ids, [IGNORE_INDEX] * len(ids), [1.0] * len(ids)))
        together = self._encode(asked, image_grid_thw)
        apart = any(branch.num_images for branch in together.branches)
        return [self._encode([each], image_grid_thw) for each in asked] if apart else [together]

    def rendered(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with its boxes in its texts, as a server is to be sent them; itself where it has none."""
        return rendered(dialogue, self.backbone.family.boxes, self.backbone.frame)

    def read(self, dialogue: Dialogue) -> Dialogue:
        """`rendered` as `decode` gives answers: to be compared with them, and shown."""
        if not dialogue.has_marks:
            return dialogue
        said = self.rendered(dialogue)
        turns = [
            replace(turn.asking(list(map(as_decoded, turn.pieces))), assistant=as_decoded(turn.assistant))
            for turn in said.turns
        ]
        return replace(said, turns=tuple(turns))

    def tokenize(self, text: str) -> tuple[int, ...]:
        """A text's tokens, as those of an answer that is learnt; none for none."""
        return self._text_ids(text) if text.strip() else ()

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    # -- inside --------------------------------------------------------------------------------------------------

    def _conversations(self, dialogues: Sequence[Dialogue], num_images: int) -> list[_Conversation]:
        return [self._tokens(dialogue, num_images, end) for dialogue in dialogues for end in self._ends(dialogue)]

    @property
    def _num_vectors(self) -> int:
        return self.backbone.num_prompt_tokens if self.num_prompt_tokens is None else self.num_prompt_tokens

    def _cut(self, conversations: Sequence[_Conversation], image_grid_thw: torch.Tensor) -> tuple[int, int, list[int]]:
        """How many tokens the prefix takes of each conversation, the images in these, and the tokens of every image."""
        cut = _shared_tokens(conversations)
        counts: list[int] = (image_grid_thw.prod(-1) // self.merge_size**2).tolist()
        return cut, conversations[0].ids[:cut].count(self.image_token_id), counts

    @cached_property
    def _answers_apart(self) -> bool:
        """Whether an earlier answer is opened otherwise than one that is asked for. Of models that think, the empty
        thought stands before the last answer alone. So an answer is learnt in a conversation that ends with it."""
        skeleton = self._skeleton(False, ("t", "t"))
        earlier, last = (skeleton[i + 1] for i, part in enumerate(skeleton) if part == USER_TEXT)
        return earlier != last

    def _ends(self, dialogue: Dialogue) -> list[int]:
        """After how many turns a dialogue ends where it is learnt from: it is whole, or ends with each answer that is
        learnt."""
        whole = len(dialogue.turns)
        if whole == 1 or not self._answers_apart:
            return [whole]
        return [end for end, turn in enumerate(dialogue.turns, start=1) if turn.weight] or [whole]

    def _render_skeleton(self, has_system: bool, shapes: tuple[str, ...]) -> tuple[str | tuple[int, ...], ...]:
        """The template's own tokens around turns; the stand-ins of `TEXTS` are where texts go.

        What the user says in a turn is of the shape "iit": each i an image, each t a text. The texts are kept apart
        from the template so that a caption that spells ``<|im_end|>`` stays the text it is.
        """
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM_TEXT}]}
        messages: list[dict] = [system] if has_system else []
        said = {"i": {"type": "image"}, "t": {"type": "text", "text": USER_TEXT}}
        for shape in shapes:
            messages.append({"role": "user", "content": [said[part] for part in shape]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER_TEXT}]})
        render = partial(self.processor.apply_chat_template, tokenize=False, **self.backbone.family.template_options)
        rendered = render(messages)
        parts = [part for part in re.split(f"([{''.join(TEXTS)}])", rendered) if part]
        expected = [SYSTEM_TEXT] * has_system
        for shape in shapes:
            expected += [USER_TEXT] * shape.count("t") + [ANSWER_TEXT]
        if [part for part in parts if part in TEXTS] != expected:
            raise ModelError(
                "The model's chat template leaves out a part of the conversation; it cannot be trained on."
            )
        opening = _after_last_text(rendered[: rendered.rindex(ANSWER_TEXT)])
        begun = _after_last_text(render(messages[:-1], add_generation_prompt=True))
        if begun != opening:
            raise ModelError(
                f"The model's chat template puts {begun!r} before an answer that is asked for, and {opening!r} before "
                "one that is learnt: other tools would ask for what was never trained. "
                "Of models that think before they answer take the 'Instruct' ones."
            )
        with self._lock:
            skeleton = [
                part if part in TEXTS else tuple(self.tokenizer(part, add_special_tokens=False)["input_ids"])
                for part in parts
            ]
        if skeleton[-1] == ANSWER_TEXT or skeleton[0] in TEXTS:
            raise ModelError(
                "The model's chat template has no mark before a turn or after it; it cannot be trained on."
            )
        placeholders = sum(token == self.image_token_id for part in skeleton if part not in TEXTS for token in part)
        num_images = "".join(shapes).count("i")
        if placeholders != num_images:
            raise ModelError(f"The chat template makes {placeholders} image placeholders for {num_images} images.")
        # What follows the last end-of-turn token (a line break) comes after everything that is predicted.
        return (*skeleton[:-1], skeleton[-1][:1])

    def _tokenize_text(self, text: str) -> tuple[int, ...]:
        return self._ahead[text] if text in self._ahead else tuple(self._tokenize([text])[0])

    def _tokenize_rendered(self, text: str) -> tuple[int, ...]:
        """The tokens of a text with boxes in it; what marks these are the special tokens, and not their letters."""
        ids: list[int] = []
        for part in filter(None, TOKEN.split(text)):
            if part in TOKENS:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
                if ids[-1] in (None, self.tokenizer.unk_token_id):
                    raise ModelError(f"The model's tokenizer has no {part}; it cannot be trained on boxes.")
            else:
                ids += self._text_ids(part)
        return tuple(ids)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        with self._lock:
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _tokens(
        self, dialogue: Dialogue, num_images: int, end: int | None = None, *, without_last_answer: bool = False
    ) -> _Conversation:
        """The dialogue up to its turn ``end``; where `_answers_apart`, the last answer alone has labels."""
        tokens_of = self._tokenize_rendered if dialogue.has_marks else self._text_ids
        turns = self.rendered(dialogue).turns[:end]
        in_front = 0 if any(turn.images for turn in dialogue.turns) else num_images
        shapes = tuple(_shape(turn, in_front if number == 0 else 0) for number, turn in enumerate(turns))
        system = [dialogue.system.strip()] if dialogue.system else []
        texts = iter(system + [text for turn in turns for text in _said(turn)])
        first = len(turns) - 1 if len(turns) > 1 and self._answers_apart else 0  # of the answers that are learnt
        answer_weights = iter([turn.weight if number >= first else 0.0 for number, turn in enumerate(turns)])
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        weight = 0.0  # of what comes after an answer
        skeleton = self._skeleton(bool(dialogue.system), shapes)
        # The last answer stands before the last part: the end-of-turn token.
        for part in skeleton[:-2] if without_last_answer else skeleton:
            new = tokens_of(next(texts)) if isinstance(part, str) else part
            ids += new
            # The end-of-turn token after an answer is learnt with it: it is how the model stops.
            learnt = len(new) if part == ANSWER_TEXT else 1
            weight = next(answer_weights) if part == ANSWER_TEXT else weight
            learnt = learnt if weight else 0
            labels += [*new[:learnt], *[IGNORE_INDEX] * (len(new) - learnt)]
            weights += [weight] * len(new)
            weight = weight if part == ANSWER_TEXT else 0.0
        return _Conversation(ids, labels, weights)

    def _encode(self, conversations: list[_Conversation], image_grid_thw: torch.Tensor) -> Encoded:
        """Cut each conversation after what all begin with, and give every image as many tokens as it has."""
        ids = conversations[0].ids
        cut, first, counts = self._cut(conversations, image_grid_thw)
        prefix = [-1 - i for i in range(self._num_vectors)] + self._with_images(ids[:cut], ids[:cut], counts)
        prefix_ids = torch.tensor(prefix, dtype=torch.long)
        positions = mrope_positions(prefix_ids, image_grid_thw, self.image_token_id, self.merge_size)

        def branch(tokens: list[int], labels: list[int], weights: list[float]) -> Branch:
            tokens, labels, weights = tokens[cut:], labels[cut:], weights[cut:]
            plain = all(w == 1 for w, label in zip(weights, labels, strict=True) if label != IGNORE_INDEX)
            weighed = None if plain else torch.tensor(self._with_images(weights, tokens, counts[first:]))
            num_images = tokens.count(self.image_token_id)
            if not num_images:
                return Branch(torch.tensor(tokens), torch.tensor(labels), weights=weighed)
            input_ids = torch.tensor(self._with_images(tokens, tokens, counts[first:]))
            places = mrope_positions(input_ids, image_grid_thw[first:], self.image_token_id, self.merge_size)
            learnt = torch.tensor(self._with_images(labels, tokens, counts[first:]))
            return Branch(input_ids, learnt, places, weighed, num_images)

        branches = tuple(branch(*conversation) for conversation in conversations)
        return Encoded(prefix_ids, positions, branches, images_in_prefix=first)

    def _with_images(self, values: list, ids: list[int], counts: Sequence[int]) -> list:
        """The values of these tokens, each image's placeholder as often as the image has tokens."""
        left = iter(counts)
        return [
            value
            for value, token in zip(values, ids, strict=True)
            for _ in range(next(left) if token == self.image_token_id else 1)
        ]


def _shape(turn: Turn, in_front: int) -> str:
    """What is said in a turn, for `Encoder._render_skeleton`."""
    if not turn.images:
        return "i" * in_front + "t"
    return "i".join("t" if piece.strip() else "" for piece in turn.pieces)


def _said(turn: Turn) -> list[str]:
    """The texts of a turn as they are tokenised.

    Outer white space goes: a text's and the template's line break beside it would become one token.
    """
    pieces = [piece for piece in turn.pieces if piece.strip()] if turn.images else [turn.user]
    if pieces:
        pieces[0] = pieces[0].lstrip()
        pieces[-1] = pieces[-1].rstrip()
    return [*pieces, turn.assistant.strip()]


def _after_last_text(rendered: str) -> str:
    """What the template puts after the last of the texts."""
    return rendered[max(rendered.rfind(text) for text in TEXTS) + 1 :]


def _shared_tokens(conversations: Sequence[_Conversation]) -> int:
    """How many tokens all begin with, short of the last one before an answer: each branch must begin unlabelled."""
    # In a dictionary's order: what the first and the last have in common, those between them have too.
    first, last = min(each.ids for each in conversations), max(each.ids for each in conversations)
    common = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    labels = [each.labels for each in conversations]
    unlabelled = (next((n for n, x in enumerate(each) if x != IGNORE_INDEX), len(each)) for each in labels)
    return min(common, min(unlabelled) - 1)
