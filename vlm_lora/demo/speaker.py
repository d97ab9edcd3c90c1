"""The models behind the page: one base, loaded once, the adapters that were chosen, and one answer at a time."""

import asyncio
import logging
import reprlib
import threading
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr

from vlm_lora import ImageRef
from vlm_lora.demo.inputs import plain
from vlm_lora.errors import AdapterError, ConfigError, DataError

if TYPE_CHECKING:
    from vlm_lora import Captioner

log = logging.getLogger(__name__)

MAX_SECONDS = 120
"""For one request, both models together."""


def plainly(error: Exception) -> gr.Error:
    """What a person at the page is told: errors about the picture say what to do, others stay in the log."""
    if isinstance(error, DataError | ConfigError):
        return plain(str(error))
    log.error("The demo could not answer", exc_info=error)
    return plain("The model could not answer this. What went wrong is in the demo's log.")


@dataclass
class _Answer:
    """What was said so far, written by the thread that decodes and read by the page, in whose loop it is made."""

    base: str = ""
    tuned: str = ""
    waits: bool = False
    done: bool = False
    cut: bool = False
    error: Exception | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def tell(self) -> None:
        with suppress(RuntimeError):  # the page was closed, and nobody listens
            self.loop.call_soon_threadsafe(self.changed.set)


class Speaker:
    """The captioners, one answer at a time, each decoded from first to last token in a thread of its own.

    Gradio takes the steps of a generator no faster than the page does, and may leave it half-way. The model is
    spared that: it decodes at its own pace until done or stopped. The page waits for it without blocking anything.

    Args:
        first: the captioner that is being loaded.
        runs: folders of the adapters that can be chosen, by name.
        chosen: the name of the one that ``first`` has; empty where it has none.
    """

    def __init__(self, first: "Future[Captioner]", runs: Mapping[str, Path], chosen: str):
        self.first = first
        self.runs = runs
        self.chosen = chosen
        self.others: dict[str, Captioner] = {}
        self.attaching = threading.Lock()
        self.decoding = threading.Lock()

    def captioner(self, name: str) -> "Captioner":
        """The base with the adapter of that name; waits until the base is loaded.

        Raises:
            ConfigError: there is none, it was made for another base, or cannot be read; the sentence names no path.
        """
        if name not in (self.chosen, *self.runs):
            raise ConfigError(f"--adapter is {reprlib.repr(name)}; expected one of: {', '.join(self.runs)}")
        first = self.first.result()
        if name == self.chosen:
            return first
        with self.attaching:
            if name not in self.others:
                try:
                    self.others[name] = first.with_adapter(self.runs[name])
                except AdapterError as error:
                    log.warning("%s", error)
                    raise ConfigError(
                        f"The adapter {name} does not go with the base model that is loaded, or is damaged. "
                        "What is wrong is in the demo's log; for another base, start a demo with that adapter"
                    ) from None
            return self.others[name]

    def prompt(self, name: str) -> str:
        """What that adapter asks for captions with."""
        try:
            return self.captioner(name).prompt
        except Exception as error:
            raise plainly(error) from None

    async def say(
        self, image: ImageRef, prompt: str | None, numbers: dict, name: str, who: tuple[str, ...]
    ) -> AsyncIterator[tuple[str, str] | None]:
        """(base, tuned) so far, whenever there is more; None where another answer comes first.

        The decoding stops when the generator is closed or cancelled.
        """
        answer = _Answer()
        threading.Thread(target=self._decode, args=(answer, image, prompt, numbers, name, who), daemon=True).start()
        done = False
        try:
            while not done:
                await answer.changed.wait()
                answer.changed.clear()
                done = answer.done  # read before the texts, which are whole then
                if answer.error is None:
                    yield None if answer.waits else (answer.base, answer.tuned)
        finally:
            answer.stopped.set()
        if answer.error is not None:
            raise plainly(answer.error) from answer.error
        if answer.cut:
            gr.Warning(f"Stopped after {MAX_SECONDS} seconds.")

    def _decode(
        self, answer: _Answer, image: ImageRef, prompt: str | None, numbers: dict, name: str, who: tuple[str, ...]
    ) -> None:
        try:
            captioner = self.captioner(name)
            from vlm_lora import Decoding  # here, as it brings torch, which the page does not wait for

            decoding = Decoding(**numbers)
            if self.decoding.locked():
                answer.waits = True
                answer.tell()
            with self.decoding:
                answer.waits = False
                end = time.monotonic() + MAX_SECONDS
                for speaker in who:
                    if answer.stopped.is_set():
                        return
                    for text in captioner.stream(image, prompt, tuned=speaker == "tuned", decoding=decoding):
                        setattr(answer, speaker, text)
                        answer.tell()
                        answer.cut = time.monotonic() > end
                        if answer.cut or answer.stopped.is_set():
                            return
        except Exception as error:
            answer.error = error
        finally:
            answer.done = True
            answer.tell()
