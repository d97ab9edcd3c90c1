"""An example and its image grids in tokens: the shared prefix, and a branch for each dialogue.

The model's own chat template decides the text; this module finds out by rendering it where images and answers stand,
and which tokens may be learnt. The prefix is whatever all dialogues begin with: the images, and the instruction too
where, as with captions, it is the same for all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch

from vlm_lora.data.example import Dialogue, Example, Turn
from vlm_lora.data.readers import BadRow
from vlm_lora.errors import ModelError
from vlm_lora.model.packing import IGNORE_INDEX, Branch, Encoded, mrope_positions
from vlm_lora.model.preprocess import Preprocessor

# Stand-ins for users' texts while the template is rendered: private-use characters no template contains.
USER_TEXT, ANSWER_TEXT = TEXTS = ("\ue000", "\ue001")


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example ready to learn from, and its tokens."""

    example: Example
    encoded: Encoded

    @property
    def num_tokens(self) -> int:
        return self.encoded.num_tokens

    def with_branches(self, dialogues: Sequence[int]) -> "EncodedExample":
        """The same with these of its dialogues only."""
        branches = tuple(self.encoded.branches[i] for i in dialogues)
        return replace(self, encoded=replace(self.encoded, branches=branches))


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
        self._text_ids = lru_cache(maxsize=2**16)(self._tokenize_text)  # questions and answers come again and again

    def encode(self, dialogues: Sequence[Dialogue], image_grid_thw: torch.Tensor) -> Encoded:
        """Prefix and one branch a dialogue, or, where `_answers_apart`, one for each of its answers; labels are the
        answers' tokens and the end-of-turn token after each.

        Args:
            image_grid_thw: ``(num_images, 3)``; no rows for an example of text only.
        """
        conversations = [turns for dialogue in dialogues for turns in self._conversations(dialogue)]
        return self._encode([self._tokens(turns, len(image_grid_thw)) for turns in conversations], image_grid_thw)

    def encode_fitting(
        self, example: Example, image_grid_thw: torch.Tensor, max_tokens: int
    ) -> tuple[EncodedExample | None, list[BadRow]]:
        """The example with those of its dialogues that fit into ``max_tokens``, and the rows of the others.

        None instead of the example where nothing of it fits. ``image_grid_thw`` ``(num_images, 3)``.
        """
        encoded = self.encode(example.dialogues, image_grid_thw)
        if encoded.longest_sequence <= max_tokens:
            return EncodedExample(example, encoded), []
        prefix, fit, bad = len(encoded.prefix_ids), [], []
        lengths = iter([len(branch.input_ids) for branch in encoded.branches])
        for dialogue in example.dialogues:
            if (needed := prefix + max(next(lengths) for _ in self._conversations(dialogue))) <= max_tokens:
                fit.append(dialogue)
                continue
            reason = (
                f"needs {needed} tokens, {prefix} of them for images and instruction; --max-tokens is {max_tokens}. "
                f"Shorten its text, lower --max-pixels or raise --max-tokens"
            )
            bad.append(BadRow(dialogue.source, dialogue.line, reason))
        if not fit:
            return None, bad
        return EncodedExample(replace(example, dialogues=tuple(fit)), self.encode(fit, image_grid_thw)), bad

    def tokenize_ahead(self, examples: Sequence[Example]) -> None:
        """Tokenise the texts of these examples together, on all cores, for the `encode` of each that follows."""
        texts = {text.strip() for e in examples for d in e.dialogues for t in d.turns for text in (t.user, t.assistant)}
        ordered = sorted(texts)
        self._ahead = dict(zip(ordered, map(tuple, self._tokenize(ordered)), strict=True)) if ordered else {}

    def encode_requests(
        self, requests: Sequence[Sequence[Turn]], image_grid_thw: torch.Tensor, begun: str = ""
    ) -> Encoded:
        """Prefix and one branch a request, each ending where the model is to answer its last turn, or to go on with
        the answer ``begun``; no labels."""
        answer = list(self.tokenize(begun))
        asked = []
        for turns in requests:
            ids, _ = self._tokens(turns, len(image_grid_thw), without_last_answer=True)
            ids = ids + answer
            asked.append((ids, [IGNORE_INDEX] * len(ids)))
        return self._encode(asked, image_grid_thw)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """A text's tokens, as those of an answer that is learnt; none for none."""
        return self._text_ids(text) if text.strip() else ()

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True).strip()

    # -- inside --------------------------------------------------------------------------------------------------

    @cached_property
    def _answers_apart(self) -> bool:
        """Whether an earlier answer is opened otherwise than one that is asked for. Of models that think, the empty
        thought stands before the last answer alone. So an answer is learnt in a conversation that ends with it."""
        skeleton = self._skeleton(2, 0)
        earlier, last = (skeleton[i + 1] for i, part in enumerate(skeleton) if part == USER_TEXT)
        return earlier != last

    def _conversations(self, dialogue: Dialogue) -> list[Sequence[Turn]]:
        """What is learnt of a dialogue: all of it, or each of its answers after what stands before it."""
        turns = dialogue.turns
        apart = len(turns) > 1 and self._answers_apart
        return [turns[:end] for end in range(1, len(turns) + 1)] if apart else [turns]

    def _render_skeleton(self, num_turns: int, num_images: int) -> tuple[str | tuple[int, ...], ...]:
        """The template's own tokens around ``num_turns`` turns; USER_TEXT and ANSWER_TEXT stand where texts go.

        The texts are kept apart from the template so that a caption that spells ``<|im_end|>`` stays the text it is.
        """
        messages = []
        for turn in range(num_turns):
            images = [{"type": "image"}] * (num_images if turn == 0 else 0)
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": USER_TEXT}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWER_TEXT}]})
        render = partial(self.processor.apply_chat_template, tokenize=False, **self.backbone.family.template_options)
        rendered = render(messages)
        parts = [part for part in re.split(f"([{USER_TEXT}{ANSWER_TEXT}])", rendered) if part]
        if [part for part in parts if part in (USER_TEXT, ANSWER_TEXT)] != [USER_TEXT, ANSWER_TEXT] * num_turns:
            raise ModelError(
                "The model's chat template leaves out a part of the conversation; it cannot be trained on."
            )
        opening = rendered[rendered.rindex(USER_TEXT) + 1 : rendered.rindex(ANSWER_TEXT)]
        asked = render(messages[:-1], add_generation_prompt=True)
        if not asked.endswith(USER_TEXT + opening):
            begun = asked[asked.rindex(USER_TEXT) + 1 :]
            raise ModelError(
                f"The model's chat template puts {begun!r} before an answer that is asked for, and {opening!r} before "
                "one that is learnt: other tools would ask for what was never trained. "
                "Of models that think before they answer take the 'Instruct' ones."
            )
        skeleton = [
            part
            if part in (USER_TEXT, ANSWER_TEXT)
            else tuple(self.tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in parts
        ]
        if skeleton[-1] == ANSWER_TEXT or skeleton[0] in (USER_TEXT, ANSWER_TEXT):
            raise ModelError(
                "The model's chat template has no mark before a turn or after it; it cannot be trained on."
            )
        placeholders = sum(token == self.image_token_id for part in skeleton if part not in TEXTS for token in part)
        if placeholders != num_images:
            raise ModelError(f"The chat template makes {placeholders} image placeholders for {num_images} images.")
        # What follows the last end-of-turn token (a line break) comes after everything that is predicted.
        return (*skeleton[:-1], skeleton[-1][:1])

    def _tokenize_text(self, text: str) -> tuple[int, ...]:
        # Outer white space goes: a text's and the template's line break beside it would become one token.
        text = text.strip()
        return self._ahead[text] if text in self._ahead else tuple(self._tokenize([text])[0])

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _tokens(
        self, turns: Sequence[Turn], num_images: int, without_last_answer: bool = False
    ) -> tuple[list[int], list[int]]:
        """Tokens and labels of a conversation, one placeholder an image."""
        ids: list[int] = []
        labels: list[int] = []
        texts = iter([text for turn in turns for text in (turn.user, turn.assistant)])
        after_answer, answers = False, 0
        skeleton = self._skeleton(len(turns), num_images)
        first = len(turns) if len(turns) > 1 and self._answers_apart else 1  # of the answers that are learnt
        # The last answer stands before the last part: the end-of-turn token.
        for part in skeleton[:-2] if without_last_answer else skeleton:
            new = self._text_ids(next(texts)) if isinstance(part, str) else part
            ids += new
            answers += part == ANSWER_TEXT
            if part == ANSWER_TEXT and answers >= first:
                labels += new
            else:
                # The end-of-turn token after an answer is learnt with it: it is how the model stops.
                learnt = 1 if after_answer and answers >= first else 0
                labels += [*new[:learnt], *[IGNORE_INDEX] * (len(new) - learnt)]
            after_answer = part == ANSWER_TEXT
        return ids, labels

    def _encode(self, conversations: list[tuple[list[int], list[int]]], image_grid_thw: torch.Tensor) -> Encoded:
        """Cut each conversation after what all begin with, and give every image as many tokens as it has."""
        ids = conversations[0][0]
        cut = _shared_tokens(conversations)
        assert self.image_token_id not in ids[cut:], "the template puts the images before everything that differs"
        counts = iter((image_grid_thw.prod(-1) // self.merge_size**2).tolist())
        count = self.backbone.num_prompt_tokens if self.num_prompt_tokens is None else self.num_prompt_tokens
        prefix = [-1 - i for i in range(count)]
        for token in ids[:cut]:
            prefix += [token] * next(counts) if token == self.image_token_id else [token]
        prefix_ids = torch.tensor(prefix, dtype=torch.long)
        positions = mrope_positions(prefix_ids, image_grid_thw, self.image_token_id, self.merge_size)
        branches = tuple(Branch(torch.tensor(ids[cut:]), torch.tensor(labels[cut:])) for ids, labels in conversations)
        return Encoded(prefix_ids, positions, branches)


def _shared_tokens(conversations: Sequence[tuple[list[int], list[int]]]) -> int:
    """How many tokens all begin with, short of the last one before an answer: each branch must begin unlabelled."""
    # In a dictionary's order: what the first and the last have in common, those between them have too.
    first, last = min(ids for ids, _ in conversations), max(ids for ids, _ in conversations)
    common = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    unlabelled = (next((n for n, x in enumerate(each) if x != IGNORE_INDEX), len(each)) for _, each in conversations)
    return min(common, min(unlabelled) - 1)
