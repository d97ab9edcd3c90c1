"""The web demo over HTTP, with a stand-in for the model: what it answers, and what it refuses."""

import asyncio
import io
import itertools
import json
import os
import re
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")

from tests.conftest import ROOT  # noqa: E402
from vlm_lora import Decoding, ImageRef, demo, load_image  # noqa: E402
from vlm_lora.cli import main  # noqa: E402
from vlm_lora.config import TrainConfig, config_from, read_yaml, write_yaml  # noqa: E402
from vlm_lora.demo import LOOPBACK, build_app, launch, safe_settings  # noqa: E402
from vlm_lora.demo.inputs import plainly  # noqa: E402
from vlm_lora.demo.runs import Evaluations, Pictures, find_runs  # noqa: E402
from vlm_lora.demo.speaker import MAX_WAITING, Speaker, Turn  # noqa: E402
from vlm_lora.errors import AdapterError, ConfigError, DataError  # noqa: E402
from vlm_lora.inference.review import Reviewed  # noqa: E402
from vlm_lora.inference.scores import ModelScores  # noqa: E402

HTML = "<img src=x onerror=alert(1)>"


class Parrot:
    """Repeats what it is asked, word by word, and remembers how it was asked."""

    def __init__(self, prompt="Describe this image."):
        self.prompt = prompt
        self.asked = []
        self.ended = []
        self.threads = set()
        self.words = 0

    def with_adapter(self, folder):
        if folder.name == "foreign":
            raise AdapterError(f"{folder}: was trained on another base model (/models/big) than /models/small.")
        return Parrot(f"Prompt of {folder.name}.")

    def stream(self, image, request=None, *, tuned=True, decoding=None):
        self.asked.append((tuned, request, decoding))
        if request == "ratio":
            raise DataError("'wide.png' is 300 times as wide as high; crop it")
        if request == "bug":
            raise RuntimeError("/some/path/of/the/server: no kernel image")
        assert load_image(image).size == (8, 6)
        words = f"{'tuned' if tuned else 'base'} {HTML} {request or self.prompt}".split()
        try:
            for i in range(len(words) if request != "endless" else 10**6):
                self.threads.add(threading.get_ident())
                time.sleep(0.01)
                self.words += 1
                yield " ".join(words[: i + 1])
        finally:
            self.ended.append(request)


def write_run(place: Path, name: str = "run", count: int = 3) -> Path:
    """A run folder with an evaluation and losses, and ``count`` held-out pictures of the data beside it."""
    data, run = place / "photos", place / name
    data.mkdir(parents=True, exist_ok=True)
    (run / "adapter").mkdir(parents=True)
    (run / "adapter/adapter_config.json").write_text("{}")
    rows = []
    for i in range(count):
        Image.new("RGB", (8, 6), (5 * i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture {i}")
        fields = {"example": f"{i}.png", "images": [f"{i}.png"], "references": [f"picture {i}", f"{HTML} ref"]}
        base, tuned = (f"picture {i}", f"{HTML} lost") if i % 3 == 1 else ("no", f"picture {i}")
        rows.append(fields | {"question": "What\u2028?", "base": base, "tuned": tuned})
    (run / "predictions.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    values = dict.fromkeys(ModelScores.__dataclass_fields__, 0.5)
    scores = {"examples": count, "answers": count, "tokens": "vlm-lora-ptb-1", "reference_words": 2.0}
    scores |= {"intervals": {}, "base": values, "tuned": values, "gain": {}, "by_kind": {}}
    (run / "scores.json").write_text(json.dumps(scores))
    losses = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "held_out_loss": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses) + '{"step": 3, "lo')
    write_yaml(TrainConfig(data=str(data), prompt="What?"), run / "config.yaml")
    return run


def write_review(run: Path, scores: dict[str, float]) -> None:
    """What `eval --review --output` writes."""
    rows = [
        Reviewed(image, f"row of {image}", "What?", f"{HTML}\u2028{image}", score, 0.0)
        for image, score in scores.items()
    ]
    (run / "review.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))


def loaded(captioner) -> Future:
    future: Future = Future()
    future.set_result(captioner)
    return future


def serve(app):
    app.launch(server_name="127.0.0.1", server_port=None, **safe_settings(LOOPBACK))
    return app


@pytest.fixture(scope="module")
def captioner():
    return Parrot()


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.new("RGB", (8, 6), "red").save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def app(captioner, picture, folder):
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(folder))
    patch.setenv("GRADIO_MCP_SERVER", "true")
    patch.setenv("GRADIO_SHARE", "true")
    place = folder / "runs"
    runs = {name: write_run(place, name) for name in ("run", "other", "foreign")}
    app = serve(build_app(loaded(captioner), runs=runs, chosen="run"))
    yield app
    app.close(verbose=False)
    patch.undo()


@pytest.fixture(scope="module")
def client(app):
    return gradio_client.Client(app.local_url, verbose=False)


def upload(app, data: bytes, name: str = "a.png") -> str:
    answer = httpx.post(f"{app.local_url}gradio_api/upload", files={"files": (name, data)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def call(app, *values) -> str:
    """The stream of events that an API call without a client library gets."""
    started = httpx.post(f"{app.local_url}gradio_api/call/caption", json={"data": list(values)})
    assert started.status_code == 200, started.text
    url = f"{app.local_url}gradio_api/call/caption/{started.json()['event_id']}"
    return httpx.get(url, timeout=20).text


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def given(path) -> dict:
    return {"path": str(path), "orig_name": "mine.png", "meta": {"_type": "gradio.FileData"}}


NUMBERS = (32, 0.0, 1.0, 0, "run")


def parts(layout: dict):
    yield layout
    for child in layout.get("children", ()):
        yield from parts(child)


def test_page_opens_and_names_nothing_elsewhere(app):
    page = httpx.get(app.local_url)
    assert page.status_code == 200
    config = httpx.get(f"{app.local_url}config").json()
    assert not config["analytics_enabled"]
    labels = {part["props"].get("label") for part in config["components"]}
    # What the browser draws them as; a name that it does not know, it leaves out.
    drawn = {part["props"].get("label"): part["type"] for part in config["components"]}
    assert (drawn["Picture"], drawn["Pictures, or a zip of them"], drawn["Seed"]) == ("image", "file", "number")
    assert drawn["Most tokens"] == "slider"
    of_type = {each["id"]: each["type"] for each in config["components"]}
    tabs = [part for part in parts(config["layout"]) if of_type.get(part.get("id")) == "tabitem"]
    inside = [{part["id"] for part in parts(tab)} for tab in tabs]
    advanced = [each["id"] for each in config["components"] if each["props"].get("label", "").startswith("Advanced")]
    assert [len(each & set(advanced)) for each in inside] == [1, 1, 0]  # below a question alone
    assert {"Picture", "Base", "Tuned", "What the data says", "Held-out pictures of the run"} <= labels
    assert app.share_url is None
    assert not list(Path(demo.__file__).parent.glob("*.pyi"))  # Gradio likes to write one


def test_base_and_tuned_answer_and_stream(client, captioner, picture):
    job = client.submit(gradio_client.handle_file(picture), "", 32, 0.5, 0.9, 7, api_name="/caption")
    assert job.result(60) == (f"base {HTML} Describe this image.", f"tuned {HTML} Describe this image.")
    assert len(job.outputs()) > 3
    (tuned, request, decoding), (base_tuned, _, _) = captioner.asked[-2:]
    assert (tuned, base_tuned, request) == (True, False, None)
    told = (decoding.max_new_tokens, decoding.temperature, decoding.top_p, decoding.seed)
    assert told == (32, 0.5, 0.9, 7)


def test_parameters_are_those_of_the_command_line(client):
    (endpoint,) = client.view_api(return_format="dict")["named_endpoints"].values()
    names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
    assert names == ["image", "prompt", "max_new_tokens", "temperature", "top_p", "seed", "adapter"]
    assert all(parameter["parameter_has_default"] for parameter in endpoint["parameters"][1:])


def test_each_answer_is_decoded_in_one_thread(client, captioner, picture):
    captioner.threads.clear()
    client.predict(gradio_client.handle_file(picture), "Is it red?", api_name="/caption")
    assert len(captioner.threads) == 1


def test_a_cancelled_answer_ends_and_the_next_one_comes(client, captioner, picture):
    job = client.submit(gradio_client.handle_file(picture), "endless", api_name="/caption")
    end = time.monotonic() + 10
    while len(job.outputs()) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    job.cancel()
    while "endless" not in captioner.ended and time.monotonic() < end:
        time.sleep(0.05)
    assert "endless" in captioner.ended
    base, _ = client.predict(gradio_client.handle_file(picture), "And now?", api_name="/caption")
    assert base.endswith("And now?")


def test_stop_ends_what_runs_within_two_words_and_what_comes_late(app, captioner, picture):
    """As a page asks it: a number first, then the request with that number, which may come at any time."""

    def at_once(name: str) -> list:
        asked = {"data": [], "fn_index": number_of[name], "session_hash": "page"}
        return httpx.post(f"{app.local_url}gradio_api/run/predict", json=asked).json()["data"]

    def ask(prompt: str, number: int) -> str:
        values = [given(upload(app, picture.read_bytes())), prompt, *NUMBERS, number]
        asked = {"data": values, "fn_index": number_of["caption"], "session_hash": "page"}
        return httpx.post(f"{app.local_url}gradio_api/queue/join", json=asked).json()["event_id"]

    number_of: dict[str, int] = {}
    for i, fn in app.fns.items():
        if fn.name != "caption" or fn.targets:  # that without a page's event is for programs
            number_of.setdefault(fn.name, i)
    captioner.ended.clear()
    before, late = len(captioner.asked), at_once("begin")[-1]
    ask("endless", at_once("begin")[-1])
    end = time.monotonic() + 20
    while len(captioner.asked) == before and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    at_once("stop")
    words = captioner.words
    ask("late", late)
    while not captioner.ended and time.monotonic() < end:
        time.sleep(0.01)
    assert captioner.ended == ["endless"]
    assert captioner.words <= words + 2
    ask("the last", at_once("begin")[-1])
    while captioner.ended != ["endless", "the last", "the last"] and time.monotonic() < end:
        time.sleep(0.01)
    assert captioner.ended == ["endless", "the last", "the last"]  # by tuned and base


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no.png", "is not an image"),
        ("cut.png", "is damaged or cut off"),
        ("empty.png", "is empty"),
        ("drawing.svg", "is an SVG drawing"),
        ("bomb.png", "megapixels"),
    ],
)
def test_a_bad_picture_gets_a_plain_sentence(app, name, told):
    data = {
        "no.png": b"just some words",
        "cut.png": png(Image.effect_noise((64, 64), 90))[:2000],
        "empty.png": b"",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "bomb.png": png(Image.new("1", (8_000, 8_000))),
    }[name]
    path = upload(app, data, name)
    events = call(app, given(path), "", *NUMBERS)
    assert told in events
    assert "'mine.png'" in events
    assert str(Path(path).parents[1]) not in events
    assert "Traceback" not in events


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("ratio", "300 times as wide as high; crop it."),
        ("bug", "What went wrong is in the demo's log."),
        ("x" * 2001, "longer than 2,000 characters"),
    ],
)
def test_other_failures_are_plain_too(app, picture, prompt, told):
    events = call(app, given(upload(app, picture.read_bytes())), prompt, *NUMBERS)
    assert "event: error" in events
    assert told in events
    assert "/some/path" not in events


def test_what_goes_wrong_is_told_as_text_and_without_paths(tmp_path):
    """Gradio's page would show it as HTML, with pictures from anywhere."""
    told = plainly(DataError(f"{tmp_path}/runs/a {HTML}: no"), tmp_path / "runs")
    assert told.message == "A &lt;img src=x onerror=alert(1)>: no."


def test_an_upload_that_is_gone_is_to_be_chosen_again(app, picture):
    path = upload(app, picture.read_bytes())
    Path(path).unlink()
    assert "Choose it again." in call(app, given(path), "", *NUMBERS)


def test_who_has_to_wait_is_told_and_blocks_nobody(picture):
    """The loop that serves everybody goes on, and whoever gives up while waiting is gone at once."""
    loading = Future()
    captioner = Parrot()
    speaker = Speaker(loading, {}, "")

    def asks(what: str, turn: Turn | None = None):
        return speaker.say(ImageRef(path=picture, name="a.png"), what, Decoding(max_new_tokens=8), "", turn)

    async def whole(answer) -> list:
        return [texts async for texts in answer]

    async def gives_up(what: str):
        answer = asyncio.ensure_future(whole(asks(what)))
        await asyncio.sleep(0.05)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(answer, 1)

    async def is_stopped(what: str):
        turn = Turn()
        answer = asyncio.ensure_future(whole(asks(what, turn)))
        await asyncio.sleep(0.05)
        turn.next()
        assert all(isinstance(ahead, int) for ahead in await asyncio.wait_for(answer, 1))

    async def visit() -> list:
        await gives_up("while it loads")
        await is_stopped("while it loads")
        loading.set_result(captioner)
        long = asks("endless")
        while not isinstance(await asyncio.wait_for(anext(long), 20), tuple):
            pass  # those that gave up are about to leave the line
        said = asks("Red?")
        told = [await asyncio.wait_for(anext(said), 20)]
        await gives_up("while another speaks")
        await is_stopped("while another speaks")
        waiting = [asks(f"Number {i}?") for i in range(MAX_WAITING - 1)]
        assert [await asyncio.wait_for(anext(each), 20) for each in waiting] == list(range(2, MAX_WAITING + 1))
        with pytest.raises(ConfigError, match="16 requests wait already"):
            await anext(asks("One too many?"))
        for each in (long, *waiting):
            await each.aclose()
        return told + await whole(said)

    told = asyncio.run(visit())
    waited = list(itertools.takewhile(lambda ahead: ahead == 1, told))
    assert waited
    assert told[-1] == (f"base {HTML} Red?", "")
    assert all(isinstance(texts, tuple) for texts in told[len(waited) :])
    assert [request for _, request, _ in captioner.asked] == ["endless", "Red?"]


def test_the_evaluation_is_not_drawn_before_somebody_looks(app):
    drawn = [fn.name for fn in app.fns.values() if "changed" in [part.elem_id for part in fn.outputs]]
    assert "show" in drawn
    assert "look" not in drawn


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0; expected 1 or more."),
        ({"max_new_tokens": 513}, "--max-new-tokens is 513; the demo gives 512 or fewer."),
        ({"max_new_tokens": None}, "--max-new-tokens is empty; expected a whole number."),
        ({"max_new_tokens": "many"}, "--max-new-tokens is 'many'; expected a whole number."),
        ({"max_new_tokens": 2.5}, "--max-new-tokens is 2.5; expected a whole number."),
        ({"max_new_tokens": True}, "--max-new-tokens is True; expected a whole number."),
        ({"temperature": -1}, "--temperature is -1; expected 0 (greedy) or a number from"),
        ({"temperature": [0]}, "--temperature is [0]; expected a number."),
        ({"top_p": 5}, "--top-p is 5; expected above 0 and up to 1."),
        ({"seed": "x" * 999}, "'; expected a whole number."),
        ({"adapter": None}, "--adapter is None; expected one of: run, "),
        ({"adapter": ["run"]}, "--adapter is ['run']; expected one of: run, "),
        ({"image": "cat.jpg"}, "The picture is no file. From Python send it as handle_file('cat.jpg')."),
        ({"image": None}, "Choose a picture first."),
    ],
    ids=str,
)
def test_what_is_sent_wrongly_is_told_in_a_sentence(client, captioner, picture, given, told):
    before = len(captioner.asked)
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        client.predict(**{"image": gradio_client.handle_file(picture)} | given, api_name="/caption")
    assert told in str(error.value)
    assert len(str(error.value)) < 200
    assert len(captioner.asked) == before


def test_the_bounds_are_those_of_the_command_line(client, captioner, picture):
    numbers = {"max_new_tokens": 512, "temperature": 3.5, "top_p": 0.01, "seed": -7}
    client.predict(gradio_client.handle_file(picture), **numbers, api_name="/caption")
    decoding = captioner.asked[-1][2]
    assert {name: getattr(decoding, name) for name in numbers} == numbers


def test_an_emptied_seed_is_none_at_all(client, captioner, picture):
    client.predict(gradio_client.handle_file(picture), seed=None, api_name="/caption")
    assert captioner.asked[-1][2].seed == 0


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "https://a.example/a"],
)
def test_files_and_addresses_of_the_server_are_not_opened(app, captioner, path):
    before = len(captioner.asked)
    events = call(app, given(path), "", *NUMBERS)
    assert "event: error" in events
    assert "root:" not in events
    assert len(captioner.asked) == before
    assert httpx.get(f"{app.local_url}gradio_api/file={path}").status_code in (403, 404)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_name_is_refused(app, host):
    assert httpx.get(app.local_url, headers={"Host": host}).status_code == 400
    assert httpx.get(f"{app.local_url}config", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "https://127.0.0.1.evil.example", "null", "file://", "http://["]
)
def test_another_web_page_cannot_send_anything(app, origin):
    """A form on any page can upload without being asked; its browser says where it comes from."""
    folder = Path(upload(app, b"first")).parents[1]
    before = set(folder.rglob("*"))
    for path, sent in (("upload", {"files": {"files": ("a.png", b"mine")}}), ("queue/join", {"json": {"data": []}})):
        answer = httpx.post(f"{app.local_url}gradio_api/{path}", headers={"Origin": origin}, **sent)
        assert answer.status_code == 403
    assert set(folder.rglob("*")) == before
    for own in (app.local_url.rstrip("/"), "http://127.0.0.1:9"):
        files = {"files": ("a.png", b"mine")}
        assert httpx.post(f"{app.local_url}gradio_api/upload", headers={"Origin": own}, files=files).status_code == 200


def test_a_proxy_is_believed_only_names_that_are_allowed(captioner, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(loaded(captioner))
    app.launch(server_name="127.0.0.1", server_port=None, **safe_settings([*LOOPBACK, "demo.example"]))
    try:
        for forwarded in ("evil.example", "evil.example, demo.example", "demo.example.evil.example", "["):
            assert httpx.get(f"{app.local_url}config", headers={"X-Forwarded-Host": forwarded}).status_code == 400
        for forwarded in ("demo.example", "demo.example:8443", "demo.example, 127.0.0.1"):
            proxied = {"X-Forwarded-Host": forwarded, "X-Forwarded-Proto": "https", "Origin": "https://demo.example"}
            root = httpx.get(f"{app.local_url}config", headers=proxied).json()["root"]
            assert root == f"https://{forwarded.partition(',')[0]}"
        # Nor does what is allowed vouch for the name by which it is asked.
        both = {"Host": "evil.example", "X-Forwarded-Host": "demo.example"}
        assert httpx.get(f"{app.local_url}config", headers=both).status_code == 400
    finally:
        app.close(verbose=False)


def test_what_is_not_needed_is_closed(app):
    for closed in ("monitoring", "monitoring/summary", "gradio_api/runs", "gradio_api/mcp/sse", "mcp"):
        assert httpx.get(app.local_url + closed).status_code in (403, 404), closed
    assert httpx.get(app.local_url, headers={"Origin": "http://evil.example"}).headers.get(
        "access-control-allow-origin"
    ) not in ("*", "http://evil.example")


def test_a_large_upload_is_refused(app):
    files = {"files": ("a.png", b"0" * 21_000_000)}
    assert httpx.post(f"{app.local_url}gradio_api/upload", files=files).status_code == 413


def test_the_page_is_there_while_the_model_loads(picture, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    loading = Future()
    app = serve(build_app(loading, runs={"run": tmp_path}, chosen="run", loading="a large model"))
    try:
        assert "Loading a large model" in httpx.get(f"{app.local_url}config").text
        client = gradio_client.Client(app.local_url, verbose=False)
        job = client.submit(gradio_client.handle_file(picture), "", api_name="/caption")
        time.sleep(0.3)
        assert not job.done()
        loading.set_result(Parrot())
        assert job.result(20)[1].startswith("tuned")
    finally:
        app.close(verbose=False)


def test_without_an_adapter_only_the_base_is_asked(picture, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    captioner = Parrot()
    app = serve(build_app(loaded(captioner)))
    try:
        client = gradio_client.Client(app.local_url, verbose=False)
        said = client.predict(gradio_client.handle_file(picture), "Red?", api_name="/caption")
        assert said == (f"base {HTML} Red?", "")
        assert [tuned for tuned, _, _ in captioner.asked] == [False]
    finally:
        app.close(verbose=False)


def test_an_adapter_is_chosen_and_one_of_another_base_is_refused_in_a_sentence(client, captioner, app, picture):
    before = len(captioner.asked)
    said = client.predict(gradio_client.handle_file(picture), adapter="other", api_name="/caption")
    assert said == (f"base {HTML} Prompt of other.", f"tuned {HTML} Prompt of other.")
    assert len(captioner.asked) == before  # another captioner, of the same base, was asked
    events = call(app, given(upload(app, picture.read_bytes())), "", *NUMBERS[:-1], "foreign")
    assert "The adapter foreign does not go with the base model that is loaded" in events
    assert "/models" not in events
    assert "event: error" in call(app, given(upload(app, picture.read_bytes())), "", *NUMBERS[:-1], "../etc")


def test_nothing_of_the_process_stays_changed(picture, monkeypatch):
    monkeypatch.setattr("vlm_lora.Captioner", type("Loads", (), {"load": lambda *_: Parrot()}), raising=False)
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    before = dict(os.environ)
    app = launch(port=None, block=False)
    place = Path(os.environ["GRADIO_TEMP_DIR"])
    assert upload(app, picture.read_bytes()).startswith(str(place))
    app.close(verbose=False)
    assert dict(os.environ) == before
    assert not place.exists()


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_loopback_has_other_addresses_too(asked_for, host):
    launch(host=host, block=False)
    address = f"[{host}]" if ":" in host else host
    assert asked_for["server_name"] == address
    allowed = asked_for["app_kwargs"]["middleware"][0].kwargs["allowed_hosts"]
    assert set(allowed) == {*LOOPBACK, address}


def test_ipv6_loopback_is_served_and_a_foreign_name_refused(captioner, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(loaded(captioner))
    try:
        app.launch(server_name="[::1]", server_port=None, **safe_settings([*LOOPBACK, "[::1]"]))
    except OSError:
        pytest.skip("no IPv6 here")
    try:
        assert httpx.get(f"{app.local_url}config").status_code == 200
        assert httpx.get(f"{app.local_url}config", headers={"Host": "evil.example"}).status_code == 400
    finally:
        app.close(verbose=False)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "99999"], "--port 99999: is no port. Give one from 1 to 65535."),
        (["--port", "-1"], "--port -1: is no port."),
        (["--host", "300.1.1.1", "--no-auth"], "--host 300.1.1.1: is no address of this machine."),
        (["--adapter", "nowhere"], "--adapter nowhere: there is no such folder."),
        (["--adapter", "data"], "--adapter data: holds no adapter."),
        (["--adapter", "no/such/run"], "--adapter no/such/run: there is no such folder."),
        (["--adapter", "./no/run"], "--adapter ./no/run: there is no such folder."),
        (["--adapter", "/no/run"], "--adapter /no/run: there is no such folder."),
    ],
)
def test_what_cannot_be_served_is_told_before_anything_is_loaded(flags, told, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr("vlm_lora.Captioner", None, raising=False)
    assert main(["demo", *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert told in error
    assert "The demo is on" not in error


def test_a_name_behind_a_proxy_is_allowed(asked_for, monkeypatch):
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda app: None)
    assert main(["demo", "--allowed-host", "demo.example"]) == 0
    allowed = asked_for["app_kwargs"]["middleware"][0].kwargs["allowed_hosts"]
    assert set(allowed) == {*LOOPBACK, "demo.example"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_another_host_needs_a_password(host, capsys):
    with pytest.raises(ConfigError, match=re.escape(host)):
        launch(host=host)
    assert main(["demo", "--host", host]) == 2
    assert "--auth" in capsys.readouterr().err


def test_a_public_link_needs_a_password(capsys):
    assert main(["demo", "--share"]) == 2
    assert "--share opens the demo to the internet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--auth", "me"], "user:password"),
        (["--auth", ":secret"], "user:password"),
        (["--auth", "me:secret", "--no-auth"], "exclude each other"),
    ],
)
def test_half_a_password_is_refused(flags, told, capsys):
    assert main(["demo", *flags]) == 2
    assert told in capsys.readouterr().err


@pytest.fixture
def asked_for(monkeypatch):
    """What `launch` would have gradio and the captioner do, without either."""
    found = {"caught": []}
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    monkeypatch.setattr(gradio.Blocks, "launch", lambda app, **settings: found.update(settings))
    monkeypatch.setattr(demo.signal, "signal", lambda which, how: found["caught"].append((which, how)) or str(which))
    monkeypatch.setattr(gradio.Blocks, "close", lambda app, **_: found.update(closed=True))
    monkeypatch.setattr("vlm_lora.Captioner", type("Loads", (), {"load": lambda *_: Parrot()}), raising=False)
    return found


def test_being_told_to_end_while_it_starts_leaves_nothing(asked_for, monkeypatch):
    def terminated(app, **_):
        assert asked_for["caught"] == [(number, signal.default_int_handler) for number in stopping]
        raise KeyboardInterrupt  # as the handler does

    stopping = [signal.SIGTERM, signal.SIGINT]
    monkeypatch.setattr(gradio.Blocks, "launch", terminated)
    with pytest.raises(KeyboardInterrupt):
        launch()
    assert asked_for["closed"]
    assert sorted(asked_for["caught"][2:]) == sorted((number, str(number)) for number in stopping), "not put back"


def test_user_and_password_come_from_the_environment_too(asked_for, monkeypatch):
    monkeypatch.setenv("VLM_LORA_DEMO_AUTH", "me:se:cret")
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda app: None)
    assert main(["demo", "--host", "0.0.0.0"]) == 0
    assert asked_for["auth"] == ("me", "se:cret")
    assert (asked_for["server_name"], asked_for["share"]) == ("0.0.0.0", False)


def test_where_no_public_link_is_to_be_had_the_demo_does_not_stay(asked_for):
    with pytest.raises(ConfigError, match="no public link"):
        launch(share=True, auth=("me", "secret"), block=False)
    assert asked_for["share"] is True
    assert asked_for["closed"]
    middleware = asked_for["app_kwargs"]["middleware"][0]
    assert set(middleware.kwargs["allowed_hosts"]) == {*LOOPBACK, "*.gradio.live"}


def test_with_a_password_the_page_is_closed_to_others(captioner, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    app = build_app(loaded(captioner))
    app.launch(server_name="127.0.0.1", server_port=None, auth=("me", "secret"), **safe_settings(LOOPBACK))
    try:
        assert httpx.get(f"{app.local_url}config").status_code == 401
        assert httpx.post(f"{app.local_url}gradio_api/upload", files={"files": ("a.png", b"")}).status_code == 401
        assert httpx.post(f"{app.local_url}login", data={"username": "me", "password": "no"}).status_code == 400
        session = httpx.Client(base_url=app.local_url)
        assert session.post("login", data={"username": "me", "password": "secret"}).status_code == 200
    finally:
        app.close(verbose=False)


# -- runs ----------------------------------------------------------------------------------------------------


def test_runs_are_found_beside_the_one_that_is_given(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_run(tmp_path / "runs", name)
    (tmp_path / "runs/no-run").mkdir()
    for given in (tmp_path / "runs/b", str(tmp_path / "runs/b"), tmp_path / "runs/b/adapter"):
        assert list(find_runs(given)) == ["b", "a"]
    monkeypatch.chdir(tmp_path)
    assert set(find_runs(None)) == {"a", "b"}
    assert find_runs(None, beside="nowhere") == {}
    with pytest.raises(AdapterError, match="no such folder"):
        find_runs("nowhere/a", beside="nowhere")
    assert list(find_runs("owner/name", beside="nowhere")) == ["name"]  # may be the hub's


def test_examples_are_held_out_pictures_with_references(tmp_path):
    evaluations = Evaluations({"run": write_run(tmp_path, count=40)})
    found = evaluations.examples("run", 8)
    assert len({row.example for row in found}) == 8
    assert found[3].references[0] == f"picture {found[3].example[:-4]}"
    assert found[3].question == "What\u2028?"  # a line separator, which JSON leaves as it is
    assert load_image(found[3].images[0]).size == (8, 6)
    assert evaluations.examples("", 8) == evaluations.examples("nowhere", 8) == []


def test_answers_come_by_what_became_of_them(tmp_path):
    run = write_run(tmp_path, count=9)
    evaluations = Evaluations({"run": run})
    places = evaluations.places("run")
    assert {kind: sorted(of) for kind, of in places.items()} == {
        "Better": [0, 2, 3, 5, 6, 8], "Worse": [1, 4, 7], "Still wrong": [1, 4, 7],
    }  # fmt: skip
    assert evaluations.places("nowhere") == evaluations.places("") == {}
    (tmp_path / "photos/4.png").unlink()
    assert 4 not in Evaluations({"run": run}).places("run")["Worse"]


def test_what_changed_is_shown_answer_by_answer(app):
    """The figures, the picture with both answers, and what to do where there is nothing; all of it as text."""

    def called(name: str, *given) -> list:
        (number,) = (
            i for i, fn in app.fns.items() if fn.name == name and (len(fn.inputs), len(fn.outputs)) == (len(given), 2)
        )
        asked = {"data": list(given), "fn_index": number, "session_hash": "x"}
        return httpx.post(f"{app.local_url}gradio_api/run/predict", json=asked, timeout=60).json()["data"]

    (show,) = {i for i, fn in app.fns.items() if fn.name == "show" and fn.outputs[0].elem_id == "changed"} - {
        i for i, fn in app.fns.items() if fn.js
    }
    asked = {"data": ["run"], "fn_index": show, "session_hash": "x"}
    head, _, radio, _, place, card, tail = httpx.post(
        f"{app.local_url}gradio_api/run/predict", json=asked, timeout=60
    ).json()["data"]
    assert "Too few images to tell" not in head  # as the file has no gain
    assert [label for label, _ in radio["choices"]] == ["Better 2", "Worse 1", "Still wrong 1"]
    assert "<b>1</b> of 2" in place
    assert "picture 0" in card
    assert 'src="data:image/png;base64,' in card
    assert "step" in tail
    place, card = called("turn", "run", "Worse", -4)  # before the first comes the last
    assert "<b>1</b> of 1" in place
    assert "<mark>lost</mark>" in card
    assert "<img src=x" not in card + head + tail


def test_reviewed_captions_come_with_their_pictures(tmp_path):
    run = write_run(tmp_path)
    evaluations = Evaluations({"run": run})
    assert evaluations.reviewed("run") == evaluations.reviewed("") == []
    write_review(run, {"0.png": 1.5, "1.png": -0.25, "2.png": 0.5, "gone.png": -3.0})
    with (run / "review.jsonl").open("a") as file:  # of a picture that could not be read
        file.write(json.dumps({"image": "3.png", "caption": "x", "error": "is not an image"}) + "\n")
    rows = evaluations.reviewed("run")
    assert [(row["image"], row["score"]) for row, _ in rows] == [("1.png", -0.25), ("2.png", 0.5), ("0.png", 1.5)]
    assert [image.name for _, image in rows] == ["1.png", "2.png", "0.png"]
    (run / "review.jsonl").write_text("{")
    assert evaluations.reviewed("run") == []


def test_a_run_whose_data_or_files_are_gone_is_told_plainly(tmp_path):
    run = write_run(tmp_path)
    for image in (tmp_path / "photos").iterdir():
        image.unlink()
    evaluations = Evaluations({"run": run})
    assert evaluations.places("run") == {}
    assert evaluations.examples("run", 8) == []
    (run / "scores.json").unlink()
    assert Evaluations({"run": run}).of("run") is None


def rewrite_config(run: Path, **settings) -> None:
    write_yaml(config_from(read_yaml(run / "config.yaml"), "config.yaml").replace(**settings), run / "config.yaml")


def test_pictures_that_are_not_beside_the_data_are_found(tmp_path):
    """As of a run with --images."""
    run = write_run(tmp_path)
    rows = [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(3)]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewrite_config(run, data=str(tmp_path / "texts/rows.jsonl"), images=str(tmp_path / "photos"))
    assert len(Evaluations({"run": run}).examples("run", 8)) == 3


@pytest.mark.parametrize("output", ["runs/run", "./runs/run", "../there/runs/run"])
@pytest.mark.parametrize("from_there", [True, False])
def test_data_is_found_from_wherever_the_demo_is_started(tmp_path, monkeypatch, output, from_there):
    """config.yaml names it as the training did, from where that was started."""
    work = tmp_path / "there"
    run = write_run(work / "runs")
    (work / "runs/photos").rename(work / "photos")
    (work / "texts").mkdir()
    rows = [{"image": f"{i}.png", "caption": f"picture {i}"} for i in range(3)]
    (work / "texts/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(work if from_there else tmp_path)
    for settings in (
        {"data": "photos"},
        {"data": "texts", "images": "photos"},
        {"data": "nowhere", "val": "texts/rows.jsonl", "images": "photos"},
    ):
        rewrite_config(run, **{"val": None, "images": None, "output": output} | settings)
        assert len(Evaluations({"run": run}).examples("run", 8)) == 3, settings
    # Of several sources, the training named pictures by the folder that it was given
    text = (run / "predictions.jsonl").read_text()
    (run / "predictions.jsonl").write_text(re.sub(r'"(\d.png)"', r'"photos/\1"', text))
    rewrite_config(run, data=("photos:2", "texts"), val=None, images="photos")
    assert len(Evaluations({"run": run}).examples("run", 8)) == 3


def test_data_is_found_from_where_the_run_was_started(tmp_path, monkeypatch, caplog):
    """Recorded in config.yaml: that the run's own name is absolute tells nothing of it."""
    run = write_run(tmp_path / "runs")
    (tmp_path / "there").mkdir()
    data = (tmp_path / "runs/photos").rename(tmp_path / "there/photos")
    monkeypatch.chdir(tmp_path / "there")
    rewrite_config(run, data="photos", output=str(run))
    monkeypatch.chdir(tmp_path)
    assert len(Evaluations({"run": run}).examples("run", 8)) == 3
    data.rename(tmp_path / "gone")
    assert Evaluations({"run": run}).examples("run", 8) == []
    assert f"'photos' is not in {tmp_path / 'there'}, where it was started" in caplog.text
    assert "hub" not in caplog.text


def test_a_damaged_picture_is_left_out(tmp_path, caplog):
    path = tmp_path / "a.png"
    path.write_bytes(b"nothing")
    assert Pictures(tmp_path).file(ImageRef(path=path, name="a.png")) is None
    assert "a.png" in caplog.text


# -- the documentation ---------------------------------------------------------------------------------------


def test_the_documented_call_works(app, picture, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/demo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.jpg").write_bytes(picture.read_bytes())
    exec(code.replace("http://127.0.0.1:7860", app.local_url), {})
    assert f"tuned {HTML}" in capsys.readouterr().out
    (endpoint,) = (
        gradio_client.Client(app.local_url, verbose=False).view_api(return_format="dict")["named_endpoints"].values()
    )
    for parameter in endpoint["parameters"]:
        assert f"`{parameter['parameter_name']}`" in text
