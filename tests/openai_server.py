"""A small OpenAI-compatible server of a real model, for tests.

    python -m tests.openai_server MODEL ADAPTER

Prints its port once it listens on loopback. ``POST /faults`` takes a list; the next chat requests get one of them each:
a status, ``hang`` (no answer) or ``cut`` (the connection ends within the answer). ``GET /seen`` tells how many chat
requests have come since then, and how many at once.
"""

import base64
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from vlm_lora import Captioner, Decoding

NAME = "photos"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})
        elif self.path == "/seen":
            self.reply(200, self.server.seen)
        else:
            self.reply(404, {"error": {"message": "no such path"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        if self.path == "/faults":
            server.faults, server.seen = body, {"requests": 0, "at_once": 0}
            return self.reply(200, {})
        with server.counting:
            server.seen["requests"] += 1
            server.under_way += 1
            server.seen["at_once"] = max(server.seen["at_once"], server.under_way)
            fault = server.faults.pop(0) if server.faults else None
        try:
            self.answer(body, fault)
        finally:
            with server.counting:
                server.under_way -= 1

    def answer(self, body: dict, fault: str | None) -> None:
        if fault == "hang":
            time.sleep(60)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif body["model"] != NAME:
            self.reply(404, {"error": {"message": f"there is no model {body['model']}"}})
        elif not 0 < body.get("top_p", 0.5) < 1:  # as TGI has it
            self.reply(422, {"error": {"message": "`top_p` must be > 0.0 and < 1.0"}})
        elif fault:
            self.reply(int(fault), {"error": {"message": f"made to fail with {fault}"}}, {"Retry-After": "0"})
        else:
            (message,) = body["messages"]
            image, text = message["content"]
            data = base64.b64decode(image["image_url"]["url"].partition(";base64,")[2], validate=True)
            decoding = Decoding(
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                top_p=body.get("top_p", 1.0),
                seed=body["seed"],
            )
            with self.server.thinking:
                said = self.server.captioner.answer(data, text["text"], decoding=decoding)
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            self.reply(200, {"object": "chat.completion", "model": NAME, "choices": [choice]})

    def reply(self, status: int, body: dict, headers: dict | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def main() -> None:
    model, adapter = sys.argv[1:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.captioner = Captioner.load(model, adapter)
    server.faults, server.under_way, server.seen = [], 0, {"requests": 0, "at_once": 0}
    server.counting, server.thinking = threading.Lock(), threading.Lock()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
