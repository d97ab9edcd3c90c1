"""Captions from a server that speaks OpenAI's chat protocol: vLLM, SGLang and others."""

import base64
import io
import os
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import httpx
from PIL import Image

from vlm_lora.data.example import Dialogue, ImageRef, Turn
from vlm_lora.data.images import load_image
from vlm_lora.data.readers.beside import prompt_for
from vlm_lora.errors import ConfigError, DataError, ModelError
from vlm_lora.inference.caption import Caption, Decoding, ImageSource, name_of, source_of
from vlm_lora.model.boxes import Frame

if TYPE_CHECKING:
    from vlm_lora.inference.served import Trained  # it brings torch, which a server alone does without

ATTEMPTS = 6
"""How often a request is sent before its image gets an error."""
PAUSE = 0.5
"""Seconds before the second attempt. Each further pause is twice as long; up to half as much is added at random."""
LONGEST_PAUSE = 30.0
TIMEOUT = 120.0
"""Seconds in which the server must have answered."""
HOPELESS = 16
"""Images in a row that get no answer at all: the server has gone."""
BROKEN = 256
"""Images in a row that the server fails at (5xx, 429): it is not the images. Fewer in a row may be bad images."""
OTHER_TOKENS = -1
"""In the place of such a number: the server showed the model something else than it was trained on."""
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which another attempt may succeed."""
KEY_VARIABLE = "OPENAI_API_KEY"


class Endpoint:
    """A model served at ``url``, such as ``http://127.0.0.1:8000/v1``; a key is read from OPENAI_API_KEY.

    Args:
        model: the server's name for it; by default the only one that it serves.
        concurrency: requests at a time.
        trained: what the served model was trained with. Each request is then compared with it: where the first one
            comes to another number of tokens on the server, nothing is captioned.

    Raises:
        ModelError: no ``model`` is given, and there is no such server, or it serves several.
        ConfigError: the server puts the adapter on its base, and cannot do so with this one.
    """

    quantised = False
    """Whether the base is in four bits: what a server does with it, it does not say."""

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = TIMEOUT,
        pause: float = PAUSE,
        trained: "Trained | None" = None,
    ):
        try:
            valid = httpx.URL(url).scheme in ("http", "https") and httpx.URL(url).host
        except httpx.InvalidURL:
            valid = False
        if not valid:
            raise ConfigError(f"--endpoint {url}: expected a URL such as http://127.0.0.1:8000/v1")
        key = os.environ.get(KEY_VARIABLE)
        self.url, self.concurrency, self.pause = url.rstrip("/"), concurrency, pause
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=concurrency),
        )
        self.trained = trained
        served = {} if model and not trained else self._served()
        if not model and len(served) != 1:
            raise ModelError(f"--endpoint {self.url} serves {', '.join(served) or 'no model'}; name one with --model.")
        self.model = model or next(iter(served))
        self.base = served.get(self.model)
        """The server's name for the model that this one is an adapter on; None where it is a model of its own."""
        if trained and self.base:
            trained.require_served_on_base(self.model)

    def caption(
        self, images: Iterable[ImageSource], prompt: str, *, system: str = "", decoding: Decoding | None = None
    ) -> Iterator[Caption]:
        """As `Captioner.caption`: in order, and an image that cannot be captioned gives its error.

        Interrupted by Ctrl-C, it gives the captions that have arrived, and waits for no others.

        Raises:
            ModelError: the server refuses every request, has gone, or shows the model something else than it was
                trained on.
            ConfigError: the server would take a part of ``prompt`` for something else.
        """
        decoding = decoding or Decoding()
        decoding.require_served()
        if self.trained:
            self.trained.require_plain(prompt)
        free = threading.Semaphore(self.concurrency)

        def ask(image: ImageSource) -> Future[tuple[Caption, int]]:
            future: Future[tuple[Caption, int]] = Future()

            def work() -> None:
                with free:
                    if future.set_running_or_notify_cancel():
                        try:
                            future.set_result(self._one(image, prompt, system, decoding))
                        except BaseException as error:  # raised where the result is asked for
                            future.set_exception(error)

            # A daemon, unlike the threads of an executor: the program may end while a server hangs.
            threading.Thread(target=work, daemon=True).start()
            return future

        asked = map(ask, images)
        # Twice as many as are sent at a time: one slow answer does not make the others wait.
        waiting = deque(islice(asked, 2 * self.concurrency))
        failed = unanswered = 0  # in a row
        compared = False
        try:
            while waiting:
                caption, too_many = waiting[0].result()
                waiting.popleft()
                if too_many == OTHER_TOKENS and not compared:
                    raise ModelError(f"--endpoint {self.url}: {caption.image}: {caption.error}. Nothing was captioned.")
                compared = compared or caption.text is not None
                failed = failed + 1 if too_many > 0 else 0
                unanswered = unanswered + 1 if too_many == HOPELESS else 0
                if failed >= BROKEN or unanswered >= HOPELESS:
                    raise ModelError(
                        f"--endpoint {self.url}: {caption.error}. Run the same command again once it is back."
                    )
                yield caption
                waiting.extend(islice(asked, 1))
        except KeyboardInterrupt:
            yield from (each.result()[0] for each in waiting if each.done() and not each.exception())
            raise
        finally:
            for future in waiting:
                future.cancel()

    @property
    def tuned(self) -> bool:
        """Whether the server has the base too, so that the two can be compared."""
        return self.base is not None

    def respond(
        self,
        asked: Sequence[tuple[Sequence[ImageSource], Sequence[Dialogue]]],
        *,
        tuned: bool = True,
        decoding: Decoding | None = None,
    ) -> list[list[str] | DataError]:
        """As `Captioner.respond`: an example's answers, or why there are none.

        Raises:
            ModelError: a request failed for good, or no image is shown to the model as it was trained.
        """
        model = self.model if tuned or not self.base else self.base
        decoding = decoding or Decoding()

        def answer(images: Sequence[ImageSource], requests: Sequence[Dialogue]) -> list[str] | DataError:
            try:
                if self.trained:
                    for request in requests:
                        for text in (*(turn.user for turn in request.turns), *request.refs):
                            self.trained.require_plain(text)
                return [self._answer(images, request, model, decoding) for request in requests]
            except _OtherTokens as error:
                return error
            except (DataError, ConfigError) as error:
                return DataError(str(error))
            except httpx.HTTPError as error:
                raise ModelError(f"--endpoint {self.url}: {_reason(error)} (--model {model})") from error
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ModelError(f"--endpoint {self.url}: the server's answer holds no text.") from error

        with ThreadPoolExecutor(self.concurrency) as pool:
            answers = list(pool.map(lambda each: answer(*each), asked))
        if not any(isinstance(each, list) for each in answers):
            for each in answers:
                if isinstance(each, _OtherTokens):
                    raise ModelError(f"--endpoint {self.url}: {each}.")
        return answers

    def read(self, dialogue: Dialogue) -> Dialogue:
        """As `Encoder.read`. Raises ConfigError where nothing tells of which family the model is."""
        return self._known().encoder.read(dialogue)

    def frame(self, width: int, height: int) -> Frame | None:
        """As `Preprocessor.frame`; None where nothing tells of which family the model is."""
        return self.trained.preprocessor.frame(width, height) if self.trained else None

    # -- inside --------------------------------------------------------------------------------------------------

    def _known(self) -> "Trained":
        if self.trained is None:
            raise ConfigError(
                f"--endpoint {self.url}: the data has boxes, and in which coordinates the model speaks of them depends "
                "on its family: say what it was trained with by --adapter RUN."
            )
        return self.trained

    def _served(self) -> dict[str, str | None]:
        """The names of what is served, and of those that are adapters the name of their base."""
        try:
            reply = self._send("GET", "/models", None, attempts=3)
            return {str(model["id"]): model.get("parent") for model in reply.json()["data"]}
        except httpx.HTTPError as error:
            raise ModelError(
                f"--endpoint {self.url}: {_reason(error)}. Is the server up, is the URL's /v1 right?"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"--endpoint {self.url}: /models is not answered as OpenAI's protocol wants it."
            ) from error

    def _one(self, image: ImageSource, prompt: str, system: str, decoding: Decoding) -> tuple[Caption, int]:
        """The caption; and where the server failed, how many failures of this kind in a row end the run, else 0."""
        name = name_of(image)
        try:
            request = Dialogue((Turn(prompt_for(prompt, source_of(image)), ""),), system=system)
            if self.trained:
                self.trained.require_plain(request.turns[0].user)
            for attempt in range(1 + decoding.attempts):
                how = decoding.again(attempt) if attempt else decoding
                text = self._answer([image], request, self.model, how)
                if not (missed := decoding.missed(text)):
                    return Caption(name, text=text), 0
            return Caption(name, error=decoding.missed_by(text, missed)), 0
        except _OtherTokens as error:
            return Caption(name, error=str(error)), OTHER_TOKENS
        except (DataError, ConfigError) as error:
            return Caption(name, error=str(error)), 0
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403, 404):
                raise ModelError(
                    f"--endpoint {self.url}: {_reason(error)} (--model {self.model}; the key comes from {KEY_VARIABLE})"
                ) from error
            return Caption(name, error=_reason(error)), BROKEN if error.response.status_code in AGAIN else 0
        except httpx.HTTPError as error:
            return Caption(name, error=_reason(error)), HOPELESS
        except (ValueError, KeyError, IndexError, TypeError):
            return Caption(name, error="the server's answer holds no text"), 0

    def _answer(self, images: Sequence[ImageSource], request: Dialogue, model: str, decoding: Decoding) -> str:
        """What the server answers to the last turn of a conversation about images.

        Raises:
            DataError: an image cannot be used, or the server showed the model something else than it was trained on.
            httpx.HTTPError: the last attempt failed too.
            ValueError, KeyError, IndexError, TypeError: the answer holds no text.
        """
        pictures = [_picture(source_of(image), self.trained) for image in images]
        body = {
            "model": model,
            "messages": _messages(self._rendered(request), [url for _, url in pictures]),
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "seed": decoding.seed,
        }
        if decoding.top_p < 1:  # TGI refuses 1, which is everyone's default
            body["top_p"] = decoding.top_p
        if self.trained and (options := self.trained.preprocessor.family.template_options):
            body["chat_template_kwargs"] = options
        reply = self._send("POST", "/chat/completions", body).json()
        choice = reply["choices"][0]
        if not isinstance(text := choice["message"]["content"], str):
            raise TypeError("no text")
        if self.trained:
            there = (reply.get("usage") or {}).get("prompt_tokens")
            here = self.trained.tokens([picture for picture, _ in pictures], request)
            if there is None:
                warnings.warn(
                    f"--endpoint {self.url} tells no usage.prompt_tokens: whether it shows the model what it was "
                    "trained on was not compared.",
                    stacklevel=2,
                )
            elif there != here:
                raise _OtherTokens(
                    f"the request came to {there} tokens on the server, and to {here} as the adapter was trained: it "
                    "has another chat template, another system prompt, or other pixel limits than "
                    f"{self.trained.limits}"
                )
        return decoding.finished(text.strip(), cut=choice.get("finish_reason") == "length")

    def _rendered(self, request: Dialogue) -> Dialogue:
        return self._known().encoder.rendered(request) if request.has_marks else request

    def _send(self, method: str, path: str, body: dict | None, attempts: int = ATTEMPTS) -> httpx.Response:
        """The server's answer. Raises httpx.HTTPError if the last attempt fails too."""
        for attempt in range(1, attempts + 1):
            wait = min(LONGEST_PAUSE, self.pause * 2 ** (attempt - 1)) * random.uniform(1, 1.5)
            try:
                reply = self.client.request(method, self.url + path, json=body)
                if reply.status_code not in AGAIN or attempt == attempts:
                    return reply.raise_for_status()
                asked = reply.headers.get("Retry-After", "")
                wait = max(wait, min(LONGEST_PAUSE, float(asked))) if asked.isdecimal() else wait
            except httpx.TransportError:  # no connection, cut off, too slow
                if attempt == attempts:
                    raise
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _messages(request: Dialogue, urls: Sequence[str]) -> list[dict]:
    """The conversation up to the answer that is asked for, images where they stand, texts stripped as in training."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages: list[dict] = [{"role": "system", "content": request.system.strip()}] if request.system else []
    content = [] if any(turn.images for turn in request.turns) else images
    left = iter(images)
    for turn in request.turns:
        pieces = turn.pieces
        pieces[0] = pieces[0].lstrip()
        pieces[-1] = pieces[-1].rstrip()
        for number, piece in enumerate(pieces):
            if number:
                content = [*content, next(left)]
            if piece.strip():
                content = [*content, {"type": "text", "text": piece}]
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": turn.assistant.strip()})
        content = []
    return messages[:-1]


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the server answered {error.response.status_code}: {' '.join(error.response.text.split())[:200]}"
    return f"the server gave no answer ({type(error).__name__}: {error})"


class _OtherTokens(DataError):
    """The server showed the model something else than it was trained on."""


def _picture(source: ImageRef | Image.Image, trained: "Trained | None") -> tuple[Image.Image, str]:
    """The picture as this project sees it, and as it goes into the request: the file's own bytes if every loader reads
    the same pixels from them, else a new PNG.

    With ``trained`` it goes out in the size that the model sees. Other loaders do not turn photos upright, or drop
    transparency: the model would see what it was not tuned on.
    """
    picture = load_image(source)
    shown = trained.shown(picture) if trained else picture
    if not isinstance(source, Image.Image) and shown is picture:
        data = source.read_bytes()
        with Image.open(io.BytesIO(data)) as plain:
            kind = plain.format
            if kind in ("JPEG", "PNG", "WEBP") and plain.convert("RGB").tobytes() == picture.tobytes():
                return picture, f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return shown, f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
