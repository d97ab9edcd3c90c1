"""The models behind the page: one base, loaded once, the adapters that were chosen, and one answer at a time."""

import asyncio
import logging
import math
import reprlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vlm_lora import Caption, Decoding, ImageRef
from vlm_lora.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from vlm_lora import Captioner

log = logging.getLogger(__name__)

MAX_SECONDS = 120
"""For one request, both models together."""
MAX_WAITING = 16
"""Requests that wait for the model; whoever comes then is told so."""
MAX_PAGES = 1000
"""Open pages whose last request is remembered."""


@dataclass(eq=False)
class Answer:
    """What was said so far: written by the thread that decodes, read by the page, in whose loop it is made."""

    said: Any = None
    done: bool = False
    cut: bool = False
    stopped: bool = False
    error: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def in_loop(self, function: Callable, *given) -> None:
        with suppress(RuntimeError):  # the demo has ended, and nobody listens
            self.loop.call_soon_threadsafe(function, *given)

    def stop(self) -> None:
        self.stopped = True
        self.in_loop(self.changed.set)

    async def news(self) -> bool:
        """Waits for a change; whether it is any other than that it was stopped."""
        await self.changed.wait()
        self.changed.clear()
        return not self.stopped


@dataclass
class Turn:
    """What a page asked last in one of its tabs; whatever it asked before ends.

    Gradio's own cancelling (6.31) misses a request that a busy page is yet to send, and one that is made while another
    is being cancelled. So each has a number, and comes to nothing where it is no longer the last one's.
    """

    number: int = 0
    stays: bool = False
    """Whether what was said stays on the page."""
    answer: Answer | None = None

    def next(self, *, stays: bool = False) -> int:
        """The number of a new request; or of none, where all is to end."""
        self.number, self.stays = self.number + 1, stays
        self.answered_by(None)
        return self.number

    def answered_by(self, answer: Answer | None) -> None:
        if self.answer:
            self.answer.stop()
        self.answer = answer


class Speaker:
    """The captioners, one answer at a time, each decoded from first to last token in a thread of its own.

    Gradio takes the steps of a generator no faster than the page does, and may leave it half-way. The model is
    spared that: it decodes at its own pace until done or stopped. The page waits for it without blocking anything.

    Args:
        first: the captioner that is being loaded, with the adapter ``chosen``; empty where it has none.
        runs: folders of the adapters that can be chosen, by name; what is trained here comes to them.
    """

    def __init__(self, first: "Future[Captioner]", runs: dict[str, Path], chosen: str):
        self.first, self.runs, self.chosen = first, runs, chosen
        self.others: dict[str, Captioner] = {}
        self.attaching = threading.Lock()
        self.line: list[Answer] = []  # the one that is decoded, and those that wait

    def choices(self) -> list[tuple[str, str]]:
        """The adapters to choose from; the base alone where the demo was started without one."""
        return [*([] if self.chosen else [("none: the base alone", "")]), *((name, name) for name in self.runs)]

    def captioner(self, name: str) -> "Captioner":
        """The base with the adapter of that name; waits until the base is loaded.

        Raises:
            ConfigError: there is none, it was made for another base, or cannot be read; the sentence names no path.
        """
        if name not in (self.chosen, *self.runs):
            raise ConfigError(f"--adapter is {reprlib.repr(name)}; expected one of: {', '.join(self.runs)}")
        first = self.first.result()
        with self.attaching:
            if name != self.chosen and name not in self.others:
                try:
                    self.others[name] = first.with_adapter(self.runs[name])
                except AdapterError as error:
                    log.warning("%s", error)
                    why = "does not go with the base model that is loaded, or is damaged; the demo's log says which"
                    raise ConfigError(f"The adapter {name} {why}") from None
        return self.others.get(name, first)

    def say(
        self, image: ImageRef, prompt: str | None, decoding: Decoding, name: str, turn: Turn | None = None
    ) -> AsyncGenerator[tuple[str, str] | int, None]:
        """(base, tuned) so far, whenever there is more; how many requests come first, while any do."""

        def said(captioner: "Captioner") -> Generator[tuple[str, str]]:
            texts = {"base": "", "tuned": ""}
            yield "", ""
            for speaker in ("tuned", "base") if name else ("base",):
                for text in captioner.stream(image, prompt, tuned=speaker == "tuned", decoding=decoding):
                    texts[speaker] = text
                    yield texts["base"], texts["tuned"]

        return self._in_turn(name, said, turn, MAX_WAITING, MAX_SECONDS)

    def caption(
        self, images: Sequence[ImageRef], prompt: str | None, decoding: Decoding, name: str
    ) -> AsyncGenerator[list[Caption] | int, None]:
        """The captions of all of them so far, as one request, decoded as `Captioner.caption` does."""

        def said(captioner: "Captioner") -> Generator[list[Caption]]:
            captions = []
            for caption in captioner.caption(images, prompt, decoding=decoding):
                captions.append(caption)
                yield captions[:]

        return self._in_turn(name, said, None, math.inf, math.inf)

    async def _in_turn(
        self, name: str, said: "Callable[[Captioner], Generator]", turn: Turn | None, waits: float, seconds: float
    ) -> AsyncGenerator[Any, None]:
        """What is said so far, whenever there is more; how many requests come first, while any do.

        It ends, and the decoding with it, where the generator is closed or cancelled, or ``turn`` goes on to the next.
        """
        if len(self.line) > waits:
            raise ConfigError(f"{MAX_WAITING} requests wait already. Try again later")
        begun, done, answer = False, False, Answer()
        if turn:
            turn.answered_by(answer)
        self.line.append(answer)
        try:
            while ahead := self.line.index(answer):
                yield ahead
                if not await answer.news():
                    return
            begun = True
            threading.Thread(target=self._decode, args=(answer, name, said, seconds), daemon=True).start()
            while not done and await answer.news():
                done = answer.done  # read before what was said, which is whole then
                if answer.said is not None and answer.error is None:
                    yield answer.said
        finally:
            answer.stopped = True
            if not begun:
                self._leave(answer)
        if done and answer.error is not None:
            raise answer.error
        if answer.cut:
            gr.Warning(f"Stopped after {MAX_SECONDS} seconds.")

    def _leave(self, answer: Answer) -> None:
        self.line.remove(answer)
        for each in (answer, *self.line):
            each.changed.set()

    def _decode(self, answer: Answer, name: str, said: "Callable[[Captioner], Generator]", seconds: float) -> None:
        try:
            captioner, end = self.captioner(name), time.monotonic() + seconds
            if answer.stopped:
                return
            with closing(said(captioner)) as news:
                for answer.said in news:
                    answer.in_loop(answer.changed.set)
                    answer.cut = time.monotonic() > end
                    if answer.cut or answer.stopped:
                        return
        except Exception as error:
            answer.error = error
        finally:
            answer.done = True
            answer.in_loop(self._leave, answer)
