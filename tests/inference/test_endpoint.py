"""`caption --endpoint` against a server process that serves the real, tuned ``tiny``; failures are injected there."""

import base64
import importlib.util
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, picture
from vlm_lora import Captioner, Decoding, TrainConfig, train
from vlm_lora.cli import main
from vlm_lora.errors import ConfigError, ModelError
from vlm_lora.inference.endpoint import ATTEMPTS, HOPELESS, Endpoint

PROMPT = "What is it?"
SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """``tiny``, taught to call every picture by a word that it does not use otherwise."""
    folder = tmp_path_factory.mktemp("tuned")
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"zebra number {i}")
    config = TrainConfig(
        data=str(folder), model="tiny", output=str(folder / "run"), prompt=PROMPT, max_steps=20, batch_size=4,
        lr=1e-2, rank=4, val_split=0.0, cache=False,
    )  # fmt: skip
    train(config)
    return folder / "run"


@pytest.fixture(scope="module")
def server(tuned):
    """(URL, process) of the server."""
    command = [sys.executable, "-m", "tests.openai_server", "tiny", str(tuned)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}", process
    process.kill()
    process.wait()


@pytest.fixture
def url(server):
    return server[0]


def fail(url: str, *faults: str) -> None:
    httpx.post(f"{url}/faults", json=faults, timeout=60)


def seen(url: str) -> dict:
    return httpx.get(f"{url}/seen", timeout=60).json()


@pytest.fixture
def files(tmp_path):
    """Pictures in the forms that loaders disagree on: turned by EXIF, transparent, 16 bits."""
    paths = []
    for i in range(6):
        picture(10 + i).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(20, (96, 48)).save(tmp_path / "turned.jpg", exif=exif)
    clear = picture(21)
    clear.putalpha(picture(22).convert("L"))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.arange(4096, dtype="uint16").reshape(64, 64) * 16).save(tmp_path / "16.png")
    return [*paths, *(str(tmp_path / name) for name in ("turned.jpg", "clear.png", "16.png"))]


@pytest.fixture(scope="module")
def local(tuned):
    """What the command says without a server."""
    return Captioner.load(adapter=tuned)


def test_what_the_server_says_whatever_fails_on_the_way(local, url, files, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"nothing")
    given = [*files[:3], str(tmp_path / "bad.png"), *files[3:]]
    wanted = list(local.caption(given, decoding=SHORT))
    assert wanted != list(local.caption(given, tuned=False, decoding=SHORT))  # the adapter is served, not the base
    fail(url, "500", "429", "cut", "503", "400")
    endpoint = Endpoint(f"{url}/v1", concurrency=3, timeout=300, pause=0.05)
    assert endpoint.model == "photos"
    told = list(endpoint.caption(iter(given), PROMPT, decoding=SHORT))
    refused = [c for c in told if c.error and "400" in c.error]
    assert [c.error for c in refused] == ['the server answered 400: {"error": {"message": "made to fail with 400"}}']
    assert [c.image for c in told] == given
    assert [c for c in told if c not in refused] == [c for c in wanted if c.image != refused[0].image]
    assert told[3].error == wanted[3].error  # the bad image: never sent
    assert seen(url)["requests"] == len(files) + 4  # each failure but the refusal was sent again
    assert 2 <= seen(url)["at_once"] <= 3


def test_what_a_server_is_asked_for_again(local, url, files):
    """Here the server's sampling is ours, so what is drawn anew there is what is drawn anew here."""
    texts = [caption.text for caption in local.caption(files[:3], decoding=SHORT)]
    how = replace(SHORT, require=(texts[0].split()[-1],), attempts=3)
    fail(url)
    told = list(Endpoint(f"{url}/v1", timeout=300).caption(files[:3], PROMPT, decoding=how))
    assert told == list(local.caption(files[:3], PROMPT, decoding=how))
    assert {caption.error is None for caption in told} == {True, False}
    assert seen(url)["requests"] > 3
    for local_only in ({"avoid": ("x",)}, {"num_beams": 2}, {"top_k": 2, "temperature": 1.0}):
        with pytest.raises(ConfigError, match="cannot do --"):
            next(Endpoint(f"{url}/v1").caption(files[:1], PROMPT, decoding=replace(SHORT, **local_only)))


def test_the_command_goes_on_where_the_server_failed(local, url, files, tmp_path, capsys, monkeypatch):
    command = ["caption", *files, "--prompt", PROMPT, "--max-new-tokens", "8", "--format", "jsonl"]
    command += ["--output", str(tmp_path / "out.jsonl"), "--concurrency", "2", "--endpoint", f"{url}/v1/"]
    monkeypatch.setattr(Endpoint.__init__, "__kwdefaults__", Endpoint.__init__.__kwdefaults__ | {"pause": 0.0})
    fail(url, *["500"] * ATTEMPTS * 2)
    assert main(command) == 3
    first = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    failed = [row["image"] for row in first if "error" in row]
    assert 1 <= len(failed) <= 3
    fail(url)
    assert main(command) == 0
    assert seen(url)["requests"] == len(failed)
    assert main([*command, "--model", "other", "--overwrite"]) == 1
    assert "answered 404: " in (err := capsys.readouterr().err)
    assert "there is no model other" in err
    assert "Traceback" not in err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["image"] for row in rows) == sorted(files)
    wanted = {c.image: c.text for c in local.caption(files, decoding=SHORT)}
    assert {row["image"]: row["caption"] for row in rows} == wanted


def test_a_server_that_is_too_slow_is_asked_again_and_then_given_up(url, files):
    fail(url, *["hang"] * ATTEMPTS)
    endpoint = Endpoint(f"{url}/v1", model="photos", timeout=1, pause=0.0)
    (told,) = endpoint.caption(files[:1], PROMPT)
    assert told.error.startswith("the server gave no answer (ReadTimeout")
    assert 2 <= seen(url)["requests"] <= ATTEMPTS  # one that our timeout cut short may not have been counted


def test_the_ray_recipe_captions_batches(tuned, local, files, tmp_path):
    """Its class is called as Ray calls it."""
    spec = importlib.util.spec_from_file_location("ray_captions", ROOT / "demos/ray_captions.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    (tmp_path / "bad.png").write_bytes(b"nothing")
    given = [*files[:3], str(tmp_path / "bad.png")]
    told = recipe.Captions(str(tuned), max_new_tokens=8)({"image": np.array(given)})
    wanted = list(local.caption(given, decoding=SHORT))
    assert list(told["image"]) == given
    assert list(told["caption"]) == [caption.text or "" for caption in wanted]
    assert list(told["error"]) == [caption.error or "" for caption in wanted]


def test_a_server_that_has_gone_ends_the_run(server, files):
    url, process = server
    endpoint = Endpoint(f"{url}/v1", model="photos", concurrency=2, pause=0.0)
    process.kill()
    process.wait()
    with pytest.raises(ModelError, match=r"gave no answer \(ConnectError.*Run the same command again once it is back"):
        list(endpoint.caption(files * HOPELESS, PROMPT))
    with pytest.raises(ModelError, match=r"gave no answer.*Is the server up"):
        Endpoint(f"{url}/v1", pause=0.0)


class Stub(BaseHTTPRequestHandler):
    """Answers what the test's ``answers`` say: a status, or None for never. What is said is not the point here."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.answers(body)
        if status is None:
            self.server.ended.wait()
            return
        data = json.dumps({"choices": [{"message": {"content": "said"}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # by default 5: on a busy machine, of 32 that come at once some would wait in vain


@pytest.fixture
def stub():
    server = Server(("127.0.0.1", 0), Stub)
    server.daemon_threads, server.ended = True, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


def test_images_that_a_server_always_fails_at_do_not_stop_the_others(stub, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_lora.inference.endpoint.BROKEN", 2 * HOPELESS)
    bad = []
    for i in range(HOPELESS + 4):
        picture(i, (32, 32)).save(tmp_path / f"{i}.png")
        bad.append(str(tmp_path / f"{i}.png"))
    picture(0, (16, 16)).save(tmp_path / "good.png")
    size = len(base64.b64encode((tmp_path / "good.png").read_bytes()))
    image = lambda body: body["messages"][0]["content"][0]["image_url"]["url"]  # noqa: E731
    stub.answers = lambda body: 200 if len(image(body).partition(",")[2]) == size else 500
    endpoint = Endpoint(f"http://127.0.0.1:{stub.server_port}/v1", model="photos", pause=0.0)
    told = list(endpoint.caption([*bad, str(tmp_path / "good.png")], PROMPT))
    assert told[-1].text == "said"
    assert [caption.error for caption in told[:-1] if "answered 500" not in caption.error] == []
    with pytest.raises(ModelError, match="answered 500"):
        list(endpoint.caption(bad[:1] * 2 * HOPELESS, PROMPT))
    # A cut connection among them is one more failure, and no new beginning.
    one = iter([httpx.ConnectError("cut off")])
    send = endpoint._send

    def cut_once(*args):
        if error := next(one, None):
            raise error
        return send(*args)

    endpoint._send = cut_once
    with pytest.raises(ModelError):
        list(endpoint.caption(bad[:1] * 2 * HOPELESS, PROMPT))


def test_ctrl_c_does_not_wait_for_a_server_that_hangs(stub, tmp_path):
    for i in range(4):
        picture(i, (32, 32)).save(tmp_path / f"{i}.png")
    asked, numbers = [], itertools.count(1)

    def answers(body):
        number = next(numbers)
        asked.append(body)
        return None if number == 2 else 200

    stub.answers = answers
    command = [sys.executable, "-m", "vlm_lora", "caption", str(tmp_path), "--format", "jsonl", "--concurrency", "2"]
    command += ["--model", "photos", "--endpoint", f"http://127.0.0.1:{stub.server_port}/v1"]
    command += ["--output", str(tmp_path / "out.jsonl")]
    # What starts the tests in the background may have Ctrl-C ignored, and so would the process.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    until = time.monotonic() + 60
    while len(asked) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # the last answer is on its way
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "vlm-lora: stopped."
    assert "Traceback" not in err
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in told] == ["said"] * 3  # also those behind the one that hangs
    assert len({row["image"] for row in told}) == 3


def test_a_server_needs_no_torch():
    code = "import sys, vlm_lora.inference.endpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
