"""--allow-urls: what is fetched, from a server on this machine, and what is refused before anything is asked.

The names of the tests resolve to public addresses; only the last step, the connection, is led to our own server.
Run: pytest tests/data/test_fetch.py
"""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import pytest
from PIL import Image

import vlm_lora.data.fetch as fetch
from vlm_lora.check.clean import write_clean
from vlm_lora.check.dataset import check_dataset
from vlm_lora.cli import main
from vlm_lora.data.readers import read_dataset
from vlm_lora.errors import DataError

PUBLIC = "93.184.216.34"
NAMES = {"pictures.example": [PUBLIC], "two.example": [PUBLIC, "10.0.0.7"], "v6.example": ["2606:2800:220:1::1"]}


def png(color):
    out = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(out, "PNG")
    return out.getvalue()


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:].replace("!", "?"))
            self.end_headers()
        elif self.path.endswith(".png"):
            self.send_response(200)
            data = png(self.path[1:-4])
            self.send_header("Content-Length", str(len(data) + ("cut" in (self.headers["Host"] or "")) * 9))
            self.end_headers()
            self.wfile.write(data)
        elif self.path == "/large":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 3000)
        elif self.path == "/slow-head":
            for byte in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 100:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        else:
            self.send_error(404)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.asked, server.connected = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def connect_tcp(self, host, port, timeout):
            server.connected.append((host, port))
            return real(self, *server.server_address, timeout)

        monkeypatch.setattr(fetch, "_resolve", lambda host, port: NAMES.get(host) or [host])
        real = httpcore.SyncBackend.connect_tcp
        monkeypatch.setattr(httpcore.SyncBackend, "connect_tcp", connect_tcp)
        yield server
        server.shutdown()


def rows(*urls):
    return "".join(json.dumps({"image": url, "caption": url}) + "\n" for url in urls)


def test_pictures_of_the_web_are_read_like_others(server, tmp_path):
    (tmp_path / "x.jsonl").write_text(
        rows(
            "http://pictures.example/red.png", "http://pictures.example:8080/to//blue.png", "HTTP://v6.example/red.png"
        )
    )
    dataset = read_dataset(tmp_path / "x.jsonl", prompt="-", allow_urls=True)
    assert dataset.bad == ()
    red, blue = dataset.examples
    assert (len(red.dialogues), red.images[0].read_bytes()) == (2, png("red"))
    assert (blue.images[0].name, blue.images[0].read_bytes()) == (
        "http://pictures.example:8080/to//blue.png",
        png("blue"),
    )
    assert server.connected == [(PUBLIC, 80), (PUBLIC, 8080), (PUBLIC, 8080), ("2606:2800:220:1::1", 80)]
    assert server.asked[1:3] == [("pictures.example:8080", "/to//blue.png"), ("pictures.example:8080", "/blue.png")]
    write_clean(tmp_path / "clean", check_dataset(dataset).examples, "-")
    assert len(read_dataset(tmp_path / "clean", prompt="-").examples) == 2
    asked = len(server.asked)
    assert read_dataset(tmp_path / "x.jsonl", prompt="-").bad[0].reason.endswith("here, or pass --allow-urls")
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "2001:0:5ef5:79fb:0:59d:a0a3:f61e"),
        *("192.0.0.8", "168.63.129.16", "192.88.99.1", "3fff::1", "64:ff9b:1::1", "5f00::1"),
        *("64:ff9b::a83f:8110", "::ffff:168.63.129.16", f"::ffff:{PUBLIC}"),
    ],
)
def test_what_is_not_public_is_never_asked(address, server, monkeypatch):
    monkeypatch.setattr(fetch, "_resolve", lambda host, port: [address])
    with pytest.raises(DataError, match=r"'http://inside\.example/a\.png' cannot be fetched: .* no public address"):
        fetch.fetch_image("http://inside.example/a.png")
    monkeypatch.setattr(fetch, "_resolve", lambda host, port: [PUBLIC] if host == "pictures.example" else [address])
    with pytest.raises(DataError, match="no public address"):
        fetch.fetch_image("http://pictures.example/to/http://inside.example/a.png")
    assert server.connected == [(PUBLIC, 80)]
    assert server.asked == [("pictures.example", "/to/http://inside.example/a.png")]


def test_a_public_address_behind_nat64_is_asked(server, monkeypatch):
    """All that a network of IPv6 alone has of the web of IPv4."""
    monkeypatch.setattr(fetch, "_resolve", lambda host, port: ["64:ff9b::5db8:d822"])
    fetch.fetch_image("http://pictures.example/red.png")
    assert server.connected == [("64:ff9b::5db8:d822", 80)]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "2130706433", "0x7f.1", "localhost", "[::1]", "[::ffff:7f00:1]", "127.1"]
)
def test_this_machine_by_any_spelling_is_refused_by_the_real_resolver(host):
    with pytest.raises(DataError, match="cannot be fetched"):
        fetch.fetch_image(f"http://{host}:9/a.png")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://two.example/a.png", "two.example is 10.0.0.7, which is no public address"),
        ("http://user@127.0.0.1#@pictures.example/a.png", "no public address"),
        ("http://pictures.example/to/file:///etc/passwd", "'file:///etc/passwd' is no http:// or https:// address"),
        ("http://pictures.example/to/ftp://pictures.example/a.png", "is no http:// or https:// address"),
        ("http:///a.png", "is no http:// or https:// address"),
        ("http://pictures.example/gone", "the server answered 404 Not Found"),
        ("http://pictures.example/large", "it has more than 2,000 bytes"),
        ("http://pictures.example/slow", "it took longer than 0.5 seconds"),
        ("http://pictures.example/slow-head", "it took longer than 0.5 seconds"),
        ("http://pictures.example/to/" + "/to/" * 9 + "red.png", "it leads on more than 5 times"),
        ("http://cut.pictures.example/red.png", "it was cut off"),
        ("http://pictures.example:x/a.png", "cannot be fetched: Port could not be cast"),
        ("http://pictures.example/a b\r\nX: y", "the server answered 404"),
        ("https://pictures.example/red.png", "cannot be fetched: "),  # our server speaks no TLS
    ],
)
def test_what_is_refused_says_why(url, reason, server, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "MAX_BYTES", 2000)
    monkeypatch.setattr(fetch, "MAX_SECONDS", 0.5 if "slow" in url else 5)
    monkeypatch.setitem(NAMES, "cut.pictures.example", [PUBLIC])
    (tmp_path / "x.jsonl").write_text(rows(url, "http://pictures.example/red.png"))
    dataset = read_dataset(tmp_path, prompt="-", allow_urls=True)
    (bad,) = dataset.bad
    assert (bad.source, bad.line) == ("x.jsonl", 1)
    assert reason in bad.reason
    assert bad.reason.endswith("; download it yourself, or remove the row")
    assert "\n" not in bad.reason


def test_a_name_that_changes_its_address_is_asked_once(server, monkeypatch):
    """DNS rebinding: public when looked at, private when connected to."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    monkeypatch.setattr(fetch, "_resolve", lambda host, port: next(answers))
    fetch.fetch_image("http://pictures.example/red.png")
    assert server.connected == [(PUBLIC, 80)]


def test_the_flag_of_check(server, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(rows("http://pictures.example/red.png", "http://10.0.0.1/a.png"))
    assert main(["check", str(tmp_path)]) == 1
    assert server.connected == []
    assert main(["check", str(tmp_path), "--allow-urls", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["images"], facts["bad"][0]["line"]) == (1, 2)
