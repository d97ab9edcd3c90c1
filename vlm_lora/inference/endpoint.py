"""Captions from a server that speaks OpenAI's chat protocol: vLLM, SGLang and others."""

import base64
import io
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import islice

import httpx
from PIL import Image

from vlm_lora.data.images import load_image
from vlm_lora.data.readers.beside import prompt_for
from vlm_lora.errors import ConfigError, DataError, ModelError
from vlm_lora.inference.caption import Caption, Decoding, ImageSource, name_of, source_of

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
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504}
"""Statuses after which another attempt may succeed."""
KEY_VARIABLE = "OPENAI_API_KEY"


class Endpoint:
    """A model served at ``url``, such as ``http://127.0.0.1:8000/v1``; a key is read from OPENAI_API_KEY.

    Args:
        model: the server's name for it; by default the only one that it serves.
        concurrency: requests at a time.

    Raises:
        ModelError: no ``model`` is given, and there is no such server, or it serves several.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        concurrency: int = 16,
        timeout: float = TIMEOUT,
        pause: float = PAUSE,
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
        self.model = model or self._only_model()

    def caption(
        self, images: Iterable[ImageSource], prompt: str, *, decoding: Decoding | None = None
    ) -> Iterator[Caption]:
        """As `Captioner.caption`: in order, and an image that cannot be captioned gives its error.

        Interrupted by Ctrl-C, it gives the captions that have arrived, and waits for no others.

        Raises:
            ModelError: the server refuses every request, or has gone.
        """
        decoding = decoding or Decoding()
        decoding.require_served()
        free = threading.Semaphore(self.concurrency)

        def ask(image: ImageSource) -> Future[tuple[Caption, int]]:
            future: Future[tuple[Caption, int]] = Future()

            def work() -> None:
                with free:
                    if future.set_running_or_notify_cancel():
                        try:
                            future.set_result(self._one(image, prompt, decoding))
                        except BaseException as error:  # raised where the result is asked for
                            future.set_exception(error)

            # A daemon, unlike the threads of an executor: the program may end while a server hangs.
            threading.Thread(target=work, daemon=True).start()
            return future

        asked = map(ask, images)
        # Twice as many as are sent at a time: one slow answer does not make the others wait.
        waiting = deque(islice(asked, 2 * self.concurrency))
        failed = unanswered = 0  # in a row
        try:
            while waiting:
                caption, too_many = waiting[0].result()
                waiting.popleft()
                failed = failed + 1 if too_many else 0
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

    # -- inside --------------------------------------------------------------------------------------------------

    def _only_model(self) -> str:
        try:
            reply = self._send("GET", "/models", None, attempts=3)
            served = [str(model["id"]) for model in reply.json()["data"]]
        except httpx.HTTPError as error:
            raise ModelError(
                f"--endpoint {self.url}: {_reason(error)}. Is the server up, is the URL's /v1 right?"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"--endpoint {self.url}: /models is not answered as OpenAI's protocol wants it."
            ) from error
        if len(served) != 1:
            raise ModelError(f"--endpoint {self.url} serves {', '.join(served) or 'no model'}; name one with --model.")
        return served[0]

    def _one(self, image: ImageSource, prompt: str, decoding: Decoding) -> tuple[Caption, int]:
        """The caption; and where the server failed, how many failures of this kind in a row end the run, else 0."""
        name = name_of(image)
        try:
            source = source_of(image)
            asked = prompt_for(prompt, source)
            content = [
                {"type": "image_url", "image_url": {"url": _data_url(source)}},
                {"type": "text", "text": asked},
            ]
            for attempt in range(1 + decoding.attempts):
                text = self._asked(content, decoding.again(attempt) if attempt else decoding)
                if not (missed := decoding.missed(text)):
                    return Caption(name, text=text), 0
            return Caption(name, error=decoding.missed_by(text, missed)), 0
        except DataError as error:
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

    def _asked(self, content: list[dict], decoding: Decoding) -> str:
        """The server's answer. Raises httpx.HTTPError, and others for an answer that holds no text."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "seed": decoding.seed,
        }
        if decoding.top_p < 1:  # TGI refuses 1, which is everyone's default
            body["top_p"] = decoding.top_p
        choice = self._send("POST", "/chat/completions", body).json()["choices"][0]
        if not isinstance(text := choice["message"]["content"], str):
            raise TypeError("no text")
        return decoding.finished(text.strip(), cut=choice.get("finish_reason") == "length")

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


def _reason(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"the server answered {error.response.status_code}: {' '.join(error.response.text.split())[:200]}"
    return f"the server gave no answer ({type(error).__name__}: {error})"


def _data_url(source) -> str:
    """The image in the request: the file's own bytes if every loader reads the same pixels from them, else a new PNG.

    Other loaders do not turn photos upright, or drop transparency: the model would see what it was not tuned on.
    """
    picture = load_image(source)
    if not isinstance(source, Image.Image):
        data = source.read_bytes()
        with Image.open(io.BytesIO(data)) as plain:
            kind = plain.format
            if kind in ("JPEG", "PNG", "WEBP") and plain.convert("RGB").tobytes() == picture.tobytes():
                return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
