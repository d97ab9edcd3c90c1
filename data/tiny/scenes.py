"""Small pictures with known contents, drawn from a seed, and what can truly be said about them.

A scene is one to three things on a background: geometric shapes in a named colour, or Noto emoji. Because the contents
are known, captions, questions and answers follow by rule, and each 8x8 patch can be labelled with the thing it shows.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PATCH = 8  # pixels; the tower's patch size
SHAPES = ["circle", "rectangle", "triangle", "star", "cross", "diamond", "ring", "heart"]
COLOURS = {
    "red": (230, 20, 20), "green": (10, 190, 20), "blue": (20, 30, 235), "yellow": (245, 235, 20),
    "black": (8, 8, 8), "white": (250, 250, 250), "gray": (128, 128, 128), "brown": (150, 55, 40),
    "teal": (5, 130, 130), "orange": (250, 140, 20), "purple": (130, 25, 170), "pink": (250, 130, 190),
}  # fmt: skip
EMOJI = {
    "dog": "1f436", "cat": "1f431", "mouse": "1f42d", "cow": "1f42e", "tiger": "1f42f", "rabbit": "1f430",
    "horse": "1f434", "monkey": "1f435", "pig": "1f437", "lion": "1f981", "fox": "1f98a", "bear": "1f43b",
    "panda": "1f43c", "frog": "1f438", "elephant": "1f418", "penguin": "1f427", "owl": "1f989", "duck": "1f986",
    "parrot": "1f99c", "bee": "1f41d", "butterfly": "1f98b", "ladybug": "1f41e", "snail": "1f40c", "turtle": "1f422",
    "snake": "1f40d", "octopus": "1f419", "crab": "1f980", "fish": "1f41f", "dolphin": "1f42c", "whale": "1f433",
    "apple": "1f34e", "banana": "1f34c", "strawberry": "1f353", "grapes": "1f347", "watermelon": "1f349",
    "pineapple": "1f34d", "lemon": "1f34b", "carrot": "1f955", "tomato": "1f345", "pizza": "1f355",
    "hamburger": "1f354", "doughnut": "1f369", "cookie": "1f36a", "cake": "1f382", "car": "1f697", "bus": "1f68c",
    "bicycle": "1f6b2", "train": "1f686", "rocket": "1f680", "boat": "26f5", "tree": "1f333", "cactus": "1f335",
    "sunflower": "1f33b", "tulip": "1f337", "mushroom": "1f344", "house": "1f3e0", "tent": "26fa",
    "umbrella": "2602-fe0f", "moon": "1f319", "snowman": "26c4", "guitar": "1f3b8", "drum": "1f941",
    "trumpet": "1f3ba", "balloon": "1f388", "gift": "1f381", "key": "1f511", "bell": "1f514", "book": "1f4d5",
    "clock": "23f0", "camera": "1f4f7", "crown": "1f451", "chair": "1fa91", "football": "26bd", "basketball": "1f3c0",
    "pumpkin": "1f383", "robot": "1f916", "ghost": "1f47b", "hat": "1f3a9", "shoe": "1f45f", "cup": "2615",
}  # fmt: skip
NUMBERS = ["no", "one", "two", "three"]
THINGS = [*SHAPES, *EMOJI]


@dataclass(frozen=True, slots=True)
class Thing:
    name: str
    colour: str | None  # None for an emoji
    centre: tuple[float, float]  # x, y in pixels
    mask: np.ndarray = field(repr=False)  # (height, width) bool

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.name}" if self.colour else self.name


@dataclass(frozen=True, slots=True)
class Scene:
    image: Image.Image
    things: tuple[Thing, ...]

    def patch_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """What each 8x8 patch shows, ``(rows, columns)``: 1 + index into THINGS, and 1 + index of the colour; 0: none."""
        width, height = self.image.size
        names = np.zeros((height // PATCH, width // PATCH), dtype=np.int64)
        colours, most = names.copy(), np.full(names.shape, 5)
        for thing in self.things:
            covered = thing.mask.reshape(height // PATCH, PATCH, width // PATCH, PATCH).sum((1, 3))
            here = covered > most
            names[here] = 1 + THINGS.index(thing.name)
            colours[here] = 1 + list(COLOURS).index(thing.colour) if thing.colour else 0
            most = np.maximum(most, covered)
        return names, colours


def article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def load_emoji(package: Path) -> dict[str, Image.Image]:
    """The 64-pixel RGBA pictures of `EMOJI` from an unpacked npm package ``emoji-datasource-google``."""
    return {name: Image.open(package / f"img/google/64/{code}.png").convert("RGBA") for name, code in EMOJI.items()}


def _outline(shape: str, width: float, height: float) -> list[tuple[float, float]]:
    """Corner points around (0, 0) of a polygon shape."""
    w, h = width / 2, height / 2
    if shape == "rectangle":
        return [(-w, -h), (w, -h), (w, h), (-w, h)]
    if shape == "triangle":
        return [(0, -h), (w, h), (-w, h)]
    if shape == "diamond":
        return [(0, -h), (w, 0), (0, h), (-w, 0)]
    if shape == "cross":
        a, b = w / 3, h / 3
        return [
            (-a, -h),
            (a, -h),
            (a, -b),
            (w, -b),
            (w, b),
            (a, b),
            (a, h),
            (-a, h),
            (-a, b),
            (-w, b),
            (-w, -b),
            (-a, -b),
        ]
    if shape == "star":
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
        return [(w * r * np.cos(t), h * r * np.sin(t)) for t, r in zip(turns, radii, strict=True)]
    t = np.linspace(0, 2 * np.pi, 40)  # heart
    x = 16 * np.sin(t) ** 3 / 16
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return list(zip(w * x, h * y, strict=True))


def _shape_mask(size: tuple[int, int], shape: str, box: tuple[float, float, float, float], tilt: float) -> np.ndarray:
    """Anti-aliased coverage ``(height, width)`` in 0..1, drawn at four times the size."""
    big = Image.new("L", (size[0] * 4, size[1] * 4))
    draw = ImageDraw.Draw(big)
    x0, y0, x1, y1 = (4 * v for v in box)
    if shape in ("circle", "ring"):
        draw.ellipse((x0, y0, x1, y1), fill=255)
        if shape == "ring":
            dx, dy = (x1 - x0) * 0.25, (y1 - y0) * 0.25
            draw.ellipse((x0 + dx, y0 + dy, x1 - dx, y1 - dy), fill=0)
    else:
        cx, cy, c, s = (x0 + x1) / 2, (y0 + y1) / 2, np.cos(tilt), np.sin(tilt)
        corners = _outline(shape, x1 - x0, y1 - y0)
        draw.polygon([(cx + c * x - s * y, cy + s * x + c * y) for x, y in corners], fill=255)
    return np.asarray(big.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    kind = rng.random()
    colour = rng.uniform(225, 255, 3) if kind < 0.6 else rng.uniform(0, 255, 3)
    canvas = np.broadcast_to(colour, (height, width, 3)).copy()
    if 0.75 < kind < 0.9:
        ramp = (
            np.linspace(0, 1, height)[:, None, None] if rng.random() < 0.5 else np.linspace(0, 1, width)[None, :, None]
        )
        canvas = canvas * (1 - ramp) + rng.uniform(0, 255, 3) * ramp
    elif kind >= 0.9:
        canvas += rng.normal(0, rng.uniform(3, 15), canvas.shape)
    return canvas.clip(0, 255)


def draw_scene(
    rng: np.random.Generator,
    emoji: dict[str, Image.Image],
    size: tuple[int, int] = (64, 64),
    emoji_share: float = 0.5,
    counts: tuple[float, float, float] = (0.5, 0.35, 0.15),
) -> Scene:
    """A scene of one to three things that do not overlap, ``size`` pixels wide and high."""
    width, height = size
    canvas = _background(rng, width, height)
    count = 1 + int(rng.choice(3, p=counts))
    things: list[Thing] = []
    boxes: list[tuple[float, float, float, float]] = []
    tries = 0
    while len(things) < count and tries < 60:
        tries += 1
        as_emoji = rng.random() < emoji_share
        largest = (40, 30, 25)[count - 1]
        if as_emoji:
            w = h = float(rng.integers(16, largest + 4))
        else:
            w = rng.uniform(7, largest)
            h = w * rng.uniform(0.8, 1.25)
        name = str(rng.choice(list(EMOJI))) if as_emoji else SHAPES[min(int(rng.exponential(2.6)), len(SHAPES) - 1)]
        if name == "rectangle":
            h = rng.uniform(7, largest)
        elif name in ("circle", "ring"):
            h = w
        if not as_emoji and name not in ("circle", "rectangle", "triangle"):
            w, h = max(w, 11), max(h, 11)
        # A quarter of the things may be cut by the edge of the picture, by up to a third.
        over = 0.3 if rng.random() < 0.25 else 0.0
        x = rng.uniform(-over * w, width - w + over * w)
        y = rng.uniform(-over * h, height - h + over * h)
        box = (x, y, x + w, y + h)
        if any(x < b[2] + 1 and b[0] < box[2] + 1 and y < b[3] + 1 and b[1] < box[3] + 1 for b in boxes):
            continue
        if any(thing.name == name for thing in things):
            continue
        if as_emoji:
            sprite = emoji[name].resize((int(w), int(h)), Image.Resampling.LANCZOS)
            layer = Image.new("RGBA", size)
            layer.paste(sprite, (int(x), int(y)))
            rgba = np.asarray(layer, dtype=np.float32)
            cover, paint, colour = rgba[..., 3] / 255, rgba[..., :3], None
        else:
            colour = str(rng.choice(list(COLOURS)))
            if any(thing.colour == colour for thing in things):
                continue
            paint = np.array(COLOURS[colour]) + rng.uniform(-14, 14, 3)
            if colour == "green":
                paint = np.array([rng.uniform(0, 40), rng.uniform(130, 255), rng.uniform(0, 40)])
            ground = canvas[int(np.clip(y + h / 2, 0, height - 1)), int(np.clip(x + w / 2, 0, width - 1))]
            if np.abs(paint - ground).sum() < 110:
                continue
            tilt = rng.uniform(-0.5, 0.5) if rng.random() < 0.25 else 0.0
            cover = _shape_mask(size, name, box, tilt)
        cover = cover[..., None]
        canvas = canvas * (1 - cover) + np.clip(paint, 0, 255) * cover
        things.append(Thing(name, colour, (x + w / 2, y + h / 2), cover[..., 0] > 0.5))
        boxes.append(box)
    if not things:  # nothing stood out against this background: draw another scene
        return draw_scene(rng, emoji, size, emoji_share, counts)
    return Scene(Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)), tuple(things))


def _listing(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def place(thing: Thing, size: tuple[int, int]) -> str:
    across = ("left", "middle", "right")[min(2, max(0, int(3 * thing.centre[0] / size[0])))]
    down = ("top", "middle", "bottom")[min(2, max(0, int(3 * thing.centre[1] / size[1])))]
    if across == down:
        return "in the middle"
    if down == "middle":
        return f"on the {across}"
    return f"at the {down}" if across == "middle" else f"at the {down} {across}"


def relation(first: Thing, second: Thing) -> str:
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    if abs(dx) >= abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


CAPTION_REQUESTS = [
    "Describe this image.",
    "What is in the picture?",
    "Write a caption for this image.",
    "Describe the image.",
]
ONE_WORD = " Answer with one word."


def caption(scene: Scene, rng: np.random.Generator) -> str:
    things = list(scene.things)
    if len(things) == 2 and rng.random() < 0.6:
        first, second = things if rng.random() < 0.5 else things[::-1]
        return f"The picture shows {article(first.phrase)} {relation(first, second)} {article(second.phrase)}."
    if len(things) == 1 and rng.random() < 0.5:
        return f"The picture shows {article(things[0].phrase)} {place(things[0], scene.image.size)}."
    rng.shuffle(things)
    return f"The picture shows {_listing([article(thing.phrase) for thing in things])}."


KINDS = {"colour": 0.22, "shape": 0.2, "presence": 0.3, "absence": 0.12, "count": 0.06, "place": 0.1}
YES_NO = {"presence": 0.7, "absence": 0.3}


def question(scene: Scene, rng: np.random.Generator, kinds: dict[str, float] = KINDS) -> tuple[str, str, str]:
    """A question, its answer in a sentence, and its answer in one word, all true of the scene.

    ``kinds`` gives the share of each kind of question.
    """
    things = scene.things
    thing = things[rng.integers(len(things))]
    shapes = [t for t in things if t.colour]
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    if kind == "colour" and shapes:
        thing = shapes[rng.integers(len(shapes))]
        name = "shape" if len(things) == 1 and rng.random() < 0.3 else thing.name
        ask = rng.choice(
            [f"What color is the {name}?", f"What is the color of the {name}?", f"Which color does the {name} have?"]
        )
        return str(ask), f"The {name} is {thing.colour}.", thing.colour
    if kind == "shape" and shapes:
        thing = shapes[rng.integers(len(shapes))]
        if len(things) == 1 and rng.random() < 0.5:
            return "What shape is in the picture?", f"It is {article(thing.name)}.", thing.name
        ask = rng.choice([f"What is the {thing.colour} shape?", f"Which shape is {thing.colour}?"])
        return str(ask), f"The {thing.colour} shape is {article(thing.name)}.", thing.name
    if kind == "count":
        n = NUMBERS[len(things)]
        return "How many things are there?", f"There {'is' if n == 'one' else 'are'} {n}.", n
    if kind == "place":
        where = place(thing, scene.image.size)
        return f"Where is the {thing.name}?", f"The {thing.name} is {where}.", where
    if kind in ("presence", "absence"):
        form = rng.integers(3)
        if form == 0 and thing.colour:  # by colour
            there = rng.random() < 0.5
            present = {t.colour for t in shapes}
            colour = thing.colour if there else str(rng.choice([c for c in COLOURS if c not in present]))
            phrase = f"{colour} shape"
        elif form == 1 and thing.colour:  # by both
            there = rng.random() < 0.5
            phrase = thing.phrase
            if not there and rng.random() < 0.5:
                phrase = f"{rng.choice([c for c in COLOURS if c != thing.colour])} {thing.name}"
            elif not there:
                phrase = f"{thing.colour} {rng.choice([s for s in SHAPES[:5] if s != thing.name])}"
            there = any(t.phrase == phrase for t in things)
        else:  # by name; the wrong ones are of the same sort, or guessing would do
            there = rng.random() < 0.5
            present = {t.name for t in things}
            pool = SHAPES[:5] if thing.colour else list(EMOJI)
            wrong = [name for name in pool if name not in present]
            phrase = thing.name if there or not wrong else str(rng.choice(wrong))
            there = phrase in present
        yes, no = f"Yes, there is {article(phrase)}.", f"No, there is no {phrase}."
        if kind == "presence":
            ask = rng.choice([f"Is there {article(phrase)}?", f"Does the image contain {article(phrase)}?",
                              f"Can you see {article(phrase)} in the picture?"])  # fmt: skip
            return (str(ask), yes, "yes") if there else (str(ask), no, "no")
        ask = rng.choice([f"Is there no {phrase}?", f"Is {article(phrase)} missing?"])
        return (str(ask), "No, t" + yes[6:], "no") if there else (str(ask), "Yes, t" + no[5:], "yes")
    return "Which things are there?", f"There is {_listing([article(t.phrase) for t in things])}.", thing.name
