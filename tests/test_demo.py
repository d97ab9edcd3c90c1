"""The web demo over HTTP, with a stand-in for the model: what it answers, and what it refuses."""

import io
import json
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
from PIL import Image

gradio_client = pytest.importorskip("gradio_client")

from vlm_lora import ImageRef, demo, load_image  # noqa: E402
from vlm_lora.config import TrainConfig, write_yaml  # noqa: E402
from vlm_lora.demo import LOOPBACK, DemoExample, build_app, find_examples, launch, safe_settings  # noqa: E402
from vlm_lora.errors import ConfigError, DataError  # noqa: E402

HTML = "<img src=x onerror=alert(1)>"


class Parrot:
    """Repeats what it is asked, word by word, and remembers how it was asked."""

    adapter = object()
    prompt = "Describe this image."

    def __init__(self):
        self.asked = []
        self.ended = []
        self.threads = set()

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
                yield " ".join(words[: i + 1])
        finally:
            self.ended.append(request)


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
    example = DemoExample(ImageRef(path=picture, name="a.png"), "Is it red?", ("yes", "Yes"))
    app = serve(build_app(captioner, examples=[example]))
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


NUMBERS = (32, 0.0, 1.0, 0)


def test_page_opens_and_names_nothing_elsewhere(app):
    page = httpx.get(app.local_url)
    assert page.status_code == 200
    config = httpx.get(f"{app.local_url}config").json()
    assert not config["analytics_enabled"]
    labels = {part["props"].get("label") for part in config["components"]}
    assert {"Picture", "Base", "Tuned", "What the data says", "Held-out pictures of the run"} <= labels
    assert app.share_url is None
    assert not Path(demo.__file__).with_suffix(".pyi").exists()  # Gradio likes to write one


def test_base_and_tuned_answer_and_stream(client, captioner, picture):
    job = client.submit(gradio_client.handle_file(picture), "", 32, 0.5, 0.9, 7, api_name="/caption")
    assert job.result(20) == (f"base {HTML} Describe this image.", f"tuned {HTML} Describe this image.")
    assert len(job.outputs()) > 3
    (tuned, request, decoding), (base_tuned, _, _) = captioner.asked[-2:]
    assert (tuned, base_tuned, request) == (True, False, None)
    told = (decoding.max_new_tokens, decoding.temperature, decoding.top_p, decoding.seed)
    assert told == (32, 0.5, 0.9, 7)


def test_parameters_are_those_of_the_command_line(client):
    (endpoint,) = client.view_api(return_format="dict")["named_endpoints"].values()
    names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
    assert names == ["image", "prompt", "max_new_tokens", "temperature", "top_p", "seed"]
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
def test_a_bad_picture_gets_a_plain_sentence(app, folder, name, told):
    data = {
        "no.png": b"just some words",
        "cut.png": png(Image.effect_noise((64, 64), 90))[:2000],
        "empty.png": b"",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "bomb.png": png(Image.new("1", (8_000, 8_000))),
    }[name]
    events = call(app, given(upload(app, data, name)), "", *NUMBERS)
    assert told in events
    assert "'mine.png'" in events
    assert str(folder) not in events
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


@pytest.mark.parametrize("numbers", [(100_000, 0, 1, 0), (32, -1, 1, 0), (32, 0, 5, 0), (32, 0, 1, -1)])
def test_numbers_out_of_bounds_are_refused(app, captioner, picture, numbers):
    before = len(captioner.asked)
    assert "event: error" in call(app, given(upload(app, picture.read_bytes())), "", *numbers)
    assert len(captioner.asked) == before


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
    app = serve(build_app(loading, compare=True, loading="a large model"))
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
    captioner.adapter = None
    app = serve(build_app(captioner))
    try:
        client = gradio_client.Client(app.local_url, verbose=False)
        said = client.predict(gradio_client.handle_file(picture), "Red?", api_name="/caption")
        assert said == (f"base {HTML} Red?", "")
        assert [tuned for tuned, _, _ in captioner.asked] == [False]
    finally:
        app.close(verbose=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_another_host_needs_a_password(host):
    with pytest.raises(ConfigError, match=re.escape(host)):
        launch(host=host)


def test_examples_are_held_out_pictures_with_references(tmp_path):
    data, run = tmp_path / "photos", tmp_path / "run"
    data.mkdir()
    (run / "adapter").mkdir(parents=True)
    rows = []
    for i in range(40):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture {i}")
        fields = {"example": f"{i}.png", "images": [f"{i}.png"], "references": [f"picture {i}"]}
        rows.append(fields | {"question": "What?", "base": "no", "tuned": "yes"})
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[20:]))
    write_yaml(TrainConfig(data=str(data), prompt="What?"), run / "config.yaml")
    for adapter in (run, str(run), run / "adapter"):
        found = find_examples(adapter)
        assert len(found) == 8
        assert all(int(example.image.name[:-4]) >= 20 for example in found)
        assert found[0].references == (f"picture {found[0].image.name[:-4]}",)
        assert found[0].prompt == "What?"
    for image in data.iterdir():
        image.unlink()
    assert find_examples(run) == []
    assert find_examples(tmp_path / "nowhere") == []
    assert find_examples(None) == []
