"""A small OpenAI-compatible server of a real model, for tests.

    python -m tests.openai_server MODEL ADAPTER [--max-pixels N] [--with-base]

Prints its port once it listens on loopback. ``POST /faults`` takes a list; the next chat requests get one of them each:
a status, ``hang`` (no answer) or ``cut`` (the connection ends within the answer). ``GET /seen`` tells how many chat
requests have come since then, and how many at once.
"""

import argparse
import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import zip_longest

import torch

from vlm_lora import Captioner, Decoding
from vlm_lora.data.example import Dialogue, Turn
from vlm_lora.data.images import load_image

NAME = "photos"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/v1/models":
            data = [{"id": NAME, "object": "model"}]
            if self.server.with_base:
                data = [{"id": "base", "object": "model", "parent": None}, data[0] | {"parent": "base"}]
            self.reply(200, {"object": "list", "data": data})
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
        elif body["model"] not in (NAME, "base" if self.server.with_base else NAME):
            self.reply(404, {"error": {"message": f"there is no model {body['model']}"}})
        elif not 0 < body.get("top_p", 0.5) < 1:  # as TGI has it
            self.reply(422, {"error": {"message": "`top_p` must be > 0.0 and < 1.0"}})
        elif fault:
            self.reply(int(fault), {"error": {"message": f"made to fail with {fault}"}}, {"Retry-After": "0"})
        else:
            images, turns, messages, system = [], [], body["messages"], ""
            if messages[0]["role"] == "system":
                system, messages = messages[0]["content"], messages[1:]
            for asked, said in zip_longest(messages[::2], messages[1::2]):
                pieces = [""]
                for part in asked["content"]:
                    if part["type"] == "text":
                        pieces[-1] += part["text"]
                        continue
                    data = part["image_url"]["url"].partition(";base64,")[2]
                    images.append(load_image(base64.b64decode(data, validate=True)))
                    pieces.append("")
                turns.append(Turn("", said["content"] if said else "").asking(pieces))
            request = Dialogue(tuple(turns), system=system)
            decoding = Decoding(
                max_new_tokens=body["max_tokens"],
                temperature=body["temperature"],
                top_p=body.get("top_p", 1.0),
                seed=body["seed"],
            )
            captioner, tuned = self.server.captioner, body["model"] == NAME
            with self.server.thinking:
                entries = captioner.features.get(images)
                ((said,),) = captioner.generate([(entries, [request])], tuned=tuned, decoding=decoding)
                grids = torch.stack([entry.grid_thw for entry in entries])
                length = captioner.encoder.encode_requests([request], grids)[0].num_tokens
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            answer = {"object": "chat.completion", "model": NAME, "choices": [choice]}
            self.reply(200, answer | {"usage": {"prompt_tokens": length}})

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
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--max-pixels", type=int)
    parser.add_argument("--with-base", action="store_true")
    given = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.captioner = Captioner.load(given.model, given.adapter, max_pixels=given.max_pixels)
    server.with_base = given.with_base
    server.faults, server.under_way, server.seen = [], 0, {"requests": 0, "at_once": 0}
    server.counting, server.thinking = threading.Lock(), threading.Lock()
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
