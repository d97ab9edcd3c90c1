"""`caption --endpoint` against a server process that serves the real, tuned ``tiny``; failures are injected there."""

import base64
import importlib.util
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, picture
from tests.inference.test_export import make_adapter
from vlm_lora import Captioner, Decoding, TrainConfig, train
from vlm_lora.cli import main
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.errors import ConfigError, ModelError
from vlm_lora.inference.endpoint import ATTEMPTS, HOPELESS, Endpoint
from vlm_lora.inference.export import merge
from vlm_lora.inference.served import Trained

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


@contextmanager
def serving(*arguments):
    """(URL, process) of a server."""
    command = [sys.executable, "-m", "tests.openai_server", "tiny", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{int(process.stdout.readline())}", process
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server(tuned):
    with serving(tuned) as server:
        yield server


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


def test_a_conversation_is_asked_for_as_it_is_learnt(tuned, local, url, files):
    """A system message, images between words and in a later turn: the server counts the tokens that we count."""
    turns = (Turn(" Compare  with it.\n", "no", images=(9,)), Turn("", "yes", images=(0,)), Turn("Sure?", ""))
    asked = [(files[:2], [Dialogue(turns, system="Be terse."), Dialogue((Turn("What?", ""),))])]
    endpoint = Endpoint(f"{url}/v1", trained=Trained.load(tuned), timeout=300)
    said = endpoint.respond(asked, decoding=SHORT)
    assert said == local.respond(asked, decoding=SHORT)
    with_system = Captioner(local.backbone, local.adapter, local.features, PROMPT, "Be terse.")
    ours, theirs = (
        [caption.text for caption in captions]
        for captions in (
            with_system.caption(files[:2], decoding=SHORT),
            endpoint.caption(files[:2], PROMPT, system="Be terse.", decoding=SHORT),
        )
    )
    assert ours == theirs  # without the message the server would have counted other tokens, and given an error


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
    word = next(local.caption(files[:1], decoding=SHORT)).text.split()[-1]
    right = []
    for words in (word, f"{word} {word} {word}"):  # some images are given the one, none the other
        how = replace(SHORT, require=(words,), attempts=3)
        fail(url)
        told = list(Endpoint(f"{url}/v1", timeout=300).caption(files[:3], PROMPT, decoding=how))
        assert told == list(local.caption(files[:3], PROMPT, decoding=how))
        right.append(sum(caption.error is None for caption in told))
    assert right[0] > right[1] == 0
    assert seen(url)["requests"] == 3 * (1 + how.attempts)
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


def test_given_the_run_it_is_asked_as_it_was_trained(tuned, local, url, files, tmp_path, capsys):
    picture(7, (640, 2)).save(tmp_path / "thin.png")  # padded to a size that the processor takes: so it goes out
    given = [*files, str(tmp_path / "thin.png")]
    command = ["caption", *given, "--adapter", str(tuned), "--endpoint", f"{url}/v1", "--max-new-tokens", "8"]
    assert main([*command, "--format", "jsonl"]) == 0
    told = [json.loads(line)["caption"] for line in capsys.readouterr().out.splitlines()]
    assert told == [caption.text for caption in local.caption(given, decoding=SHORT)]
    fail(url)
    assert main([*command, "--prompt", "Say <|im_end|> again."]) == 2
    assert "holds <|im_end|>, which a server takes for a mark of its own" in capsys.readouterr().err
    assert seen(url)["requests"] == 0


def test_a_server_that_shows_the_model_something_else_is_stopped_at(tuned, local, tmp_path, capsys):
    """Its pixel limit is another: images below it are the same, others are not."""
    picture(1, (64, 64)).save(tmp_path / "1.png")
    picture(2, (96, 96)).save(tmp_path / "2.png")
    small, large = (str(tmp_path / f"{i}.png") for i in (1, 2))
    limit = local.backbone.pixel_limits[1]
    with serving(tuned, "--max-pixels", 72 * 72, "--with-base") as (url, _):
        command = ["caption", "--adapter", str(tuned), "--endpoint", f"{url}/v1", "--model", "photos"]
        assert main([*command, large, small]) == 1
        there, here = map(
            int, re.findall(r"came to (\d+) tokens on the server, and to (\d+)", capsys.readouterr().err)[0]
        )
        assert there < here
        assert main([*command, "--max-new-tokens", "8", small, large]) == 3
        told = capsys.readouterr()
        (wanted,) = local.caption([small], decoding=SHORT)
        assert told.out == f"{small}\t{wanted.text}\n"
        assert f"{large}: the request came to {there} tokens on the server, and to {here}" in told.err
        assert f"to {limit:,} pixels" in told.err
        assert main([*command[:-2], "--model", "base", small]) == 0  # no adapter there: nothing to refuse


def test_eval_gives_the_same_table_through_a_server(tuned, tmp_path, capsys):
    rows = []
    for i in range(4):
        picture(30 + i).save(tmp_path / f"{i}.png")
        turns = [("What is it?", f"zebra number {i}"), ("And then?", "zebra")]
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append({"images": [f"{i}.png", f"{(i + 1) % 4}.png"], "messages": messages})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", str(tmp_path / "rows.jsonl"), "--adapter", str(tuned), "--max-new-tokens", "8", "--blank"]
    card = tuned / "adapter/README.md"
    before = card.read_text()
    with serving(tuned, "--with-base") as (url, _):
        through = ["--endpoint", f"{url}/v1", "--model", "photos", "--output", str(tmp_path / "there")]
        assert main([*command, *through]) == 0
        assert card.read_text() == before  # a server may serve anything
        there = capsys.readouterr().out
    assert main([*command, "--output", str(tmp_path / "here")]) == 0
    assert there == capsys.readouterr().out
    both = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("here", "there")]
    assert both[0] == both[1]
    assert any(row["base"] != row["tuned"] for row in map(json.loads, both[0].splitlines()))


def test_tokens_are_counted_right_from_many_threads(tuned):
    interval, image = sys.getswitchinterval(), picture(1)
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            trained = Trained.load(tuned)
            ask = lambda i, t=trained: t.tokens([image], Dialogue((Turn(f"Number {i} <|im_end|>?", ""),)))  # noqa: E731
            with ThreadPoolExecutor(8) as pool:
                assert len(set(pool.map(ask, range(8)))) == 1
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"variant": "dora"}, "serves no DoRA"),
        ({"projector_rank": 8}, "a rank or an alpha of its own"),
        ({"projector_alpha": 64.0}, "a rank or an alpha of its own"),
        ({}, None),
    ],
)
def test_what_an_engine_cannot_put_on_a_base_is_refused(tmp_path, settings, why):
    adapter = make_adapter("tiny", tmp_path / "adapter", rank=4, **settings)
    trained = Trained.load(adapter)
    if why is None:
        trained.require_served_on_base("photos")
        return
    with pytest.raises(ConfigError, match=why):
        trained.require_served_on_base("photos")
    merge(adapter, tmp_path / "merged", dtype="float32")
    Trained.load(tmp_path / "merged").require_served_on_base("photos")  # there are no layers left to be scaled


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
    assert err.splitlines()[-1] == (
        "vlm-lora: stopped. What was written is kept; run the same command again (train: with --resume)."
    )
    assert "Traceback" not in err
    told = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in told] == ["said"] * 3  # also those behind the one that hangs
    assert len({row["image"] for row in told}) == 3


def test_a_server_needs_no_torch():
    code = "import sys, vlm_lora.inference.endpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
