"""The models behind the page: one base, loaded once, the adapters that were chosen, and one answer at a time."""

import logging
import reprlib
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
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
    """What was said so far, written by the thread that decodes and read by the page."""

    base: str = ""
    tuned: str = ""
    begun: bool = False
    cut: bool = False
    error: Exception | None = None
    changed: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class Speaker:
    """The captioners, one answer at a time, each decoded from first to last token in a thread of its own.

    Gradio takes each step of a generator in whatever thread is free, no faster than the page does, and may
    leave it half-way. The model is spared all of that: it decodes at its own pace until done or stopped.

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

    def say(
        self, image: ImageRef, prompt: str | None, numbers: dict, name: str, who: tuple[str, ...]
    ) -> Iterator[tuple[str, str]]:
        """(base, tuned) so far, whenever there is more; the decoding stops when the generator is closed."""
        answer = _Answer()
        threading.Thread(target=self._decode, args=(answer, image, prompt, numbers, name, who), daemon=True).start()
        told = False
        try:
            while not answer.done.is_set():
                answer.changed.wait(0.5)  # and not longer: only at a yield can Gradio close a generator
                answer.changed.clear()
                if self.decoding.locked() and not (answer.begun or told):
                    gr.Info("The model is busy with another request; yours comes after it.")
                    told = True
                yield answer.base, answer.tuned
        finally:
            answer.stopped.set()
        if answer.error is not None:
            raise plainly(answer.error) from None
        if answer.cut:
            gr.Warning(f"Stopped after {MAX_SECONDS} seconds.")
        yield answer.base, answer.tuned

    def _decode(
        self, answer: _Answer, image: ImageRef, prompt: str | None, numbers: dict, name: str, who: tuple[str, ...]
    ) -> None:
        try:
            captioner = self.captioner(name)
            from vlm_lora import Decoding  # here, as it brings torch, which the page does not wait for

            decoding = Decoding(**numbers)
            with self.decoding:
                answer.begun = True
                end = time.monotonic() + MAX_SECONDS
                for speaker in who:
                    if answer.stopped.is_set():
                        return
                    for text in captioner.stream(image, prompt, tuned=speaker == "tuned", decoding=decoding):
                        setattr(answer, speaker, text)
                        answer.changed.set()
                        answer.cut = time.monotonic() > end
                        if answer.cut or answer.stopped.is_set():
                            return
        except Exception as error:
            answer.error = error
        finally:
            answer.done.set()
            answer.changed.set()
