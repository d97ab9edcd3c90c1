"""A small model hub on loopback, for tests: it speaks the hub's HTTP protocol as `huggingface_hub` sends it.

Repositories are made, files above a size go to the large-file store by their hash and are checked against it, a commit
puts them in place, and without the owner's token a private repository is not there. Nothing is kept on a disk.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_ofTheTestOwner"
LARGE = 20_000
"""Bytes from which on a file goes to the large-file store."""


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.commits} {sorted(self.files.items())}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(body=None)

    do_HEAD = do_GET

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST

    def answer(self, body: bytes | None):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        hub.requests.append(f"{self.command} {path}")
        if path == "/api/repos/create":
            return self.create(json.loads(body), known)
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if store := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != store[1]:
                return self.reply(400, {"error": "these bytes have another hash"})
            hub.store[store[1]] = body
            return self.reply(200, {})
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git/info/lfs/objects)?(/.*)?", path)
        repository = hub.repositories.get(found[1]) if found else None
        if repository is None or (repository.private and not known):
            return self.reply(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        rest = found[2] or ""
        if body is not None and not known:
            return self.reply(403, {"error": "You may not write here"})
        if rest == "/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        if rest.startswith("/preupload/"):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": modes})
        if rest.startswith("/commit/"):
            return self.commit(found[1], repository, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("/resolve/"):
            return self.file(repository, rest.split("/", 3)[3])
        if rest.startswith("/tree/"):
            sha = {name: hashlib.sha1(data).hexdigest() for name, data in repository.files.items()}
            files = repository.files.items()
            return self.reply(200, [{"type": "file", "path": n, "size": len(d), "oid": sha[n]} for n, d in files])
        siblings = [{"rfilename": name, "size": len(data)} for name, data in repository.files.items()]
        about = {"id": found[1], "private": repository.private, "sha": repository.sha, "siblings": siblings}
        return self.reply(200, about | {"tags": [], "downloads": 0})

    def create(self, wanted: dict, known: bool):
        hub, name = self.server, f"{wanted['organization']}/{wanted['name']}"
        if not known:
            return self.reply(401, {"error": "Invalid username or password."})
        if name in hub.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"})
        hub.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return self.reply(200, {"url": f"{hub.url}/{name}"})

    def commit(self, name: str, repository: Repository, lines: list[dict]):
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.store:
                    return self.reply(400, {"error": f"{value['path']} was never uploaded"})
                files[value["path"]] = self.server.store[value["oid"]]
        repository.files |= files
        repository.commits += 1
        url = f"{self.server.url}/{name}/commit/{repository.sha}"
        return self.reply(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def file(self, repository: Repository, name: str):
        if name not in repository.files:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = repository.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", repository.sha)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def reply(self, status: int, body: dict | list, headers: dict | None = None):
        data = json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}
        if "error" in body:
            headers["X-Error-Message"] = body["error"]
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """``repositories`` by name, the large-file ``store`` by hash, and the ``requests`` that came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
