"""As much of the Hugging Face hub as its client needs to download a snapshot and to upload a folder."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi

LARGE = (".safetensors", ".bin")


def commit_of(revision):
    return hashlib.sha1(revision.encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Repositories, and what was asked of them.

    Attributes:
        repositories: files by repository and revision.
        fetched: paths whose contents were given away.
        ranges: where downloads began that were continued, by path.
        gated: a repository's terms have to be accepted.
        token: without it nothing is shown, where set.
        stall_at: the first download of a longer file stops after so many bytes, and `stalled` is set; once `released`
            is, its connection breaks.
        created: repositories made, with the request for them.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.ranges: dict[str, int] = {}
        self.gated = False
        self.token: str | None = None
        self.stall_at: int | None = None
        self.stalled, self.released = threading.Event(), threading.Event()
        self.objects: dict[str, bytes] = {}
        self.created: dict[str, dict] = {}

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repository, folder, revision="main"):
        """Put a folder's files into a repository."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[repository, revision] = files


@contextmanager
def running_hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch, endpoint, cache):
    """What HF_ENDPOINT and HF_HOME set, which the hub's client reads only once."""
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint=endpoint))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.server.token is not None and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
        if parts[0] == "api":
            repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
        else:
            parts = parts[parts[0] == "datasets" :]
            repository, revision = "/".join(parts[:2]), parts[3]
        published = self.server.repositories.items()
        revision, found = next((
            (name, files) for (which, name), files in published
            if which == repository and revision in (name, commit_of(name))
        ), (None, None))  # fmt: skip
        if found is None:
            known = any(which == repository for which, _ in self.server.repositories)
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        if self.server.gated:
            return self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        if parts[0] == "api" and len(parts) > 4 and parts[4] == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in found.items()
            ]
            return self.reply(200, json.dumps(listed).encode())
        if parts[0] == "api":
            listed = {"id": repository, "sha": commit_of(revision), "siblings": [{"rfilename": name} for name in found]}
            return self.reply(200, json.dumps(listed).encode())
        return self.reply_file("/".join(parts[4:]), found, commit_of(revision))

    do_HEAD = do_GET  # noqa: N815

    def reply_file(self, path, files, commit):
        if path not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command != "GET":
            return self.reply(200, data, headers)
        self.server.fetched.append(path)
        range_header = self.headers["Range"]
        if range_header is not None:
            start = int(range_header.removeprefix("bytes=").split("-")[0])
            self.server.ranges[path] = start
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[start:], headers)
        stop = self.server.stall_at
        if stop is None or len(data) <= stop or self.server.stalled.is_set():
            return self.reply(200, data, headers)
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[:stop])
        self.wfile.flush()
        self.server.stalled.set()
        self.server.released.wait()
        self.close_connection = True
        return None

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.server.token is not None and self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.reply(401, b'{"error": "who are you?"}')
        if parts[:2] == ["api", "validate-yaml"]:
            answer = {"errors": [], "warnings": []}
        elif parts[:3] == ["api", "repos", "create"]:
            values = json.loads(body)
            repository = f"{values['organization']}/{values['name']}"
            self.server.created[repository] = values
            self.server.repositories.setdefault((repository, "main"), {})
            answer = {"url": f"{self.server.endpoint}/{repository}", "id": repository}
        elif parts[-2:] == ["objects", "batch"]:
            answer = {"objects": [{"oid": entry["oid"], "size": entry["size"], "actions": {"upload": {
                "href": f"{self.server.endpoint}/upload/{entry['oid']}"}}} for entry in json.loads(body)["objects"]],
                "transfer": "basic"}  # fmt: skip
        elif parts[4] == "branch":
            files = self.server.repositories["/".join(parts[2:4]), "main"]
            self.server.repositories.setdefault(("/".join(parts[2:4]), parts[5]), dict(files))
            answer = {}
        elif parts[4] == "preupload":
            answer = {"files": [{
                "path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False} for file in json.loads(body)["files"]]}  # fmt: skip
        else:
            assert parts[4] == "commit"
            files = self.server.repositories["/".join(parts[2:4]), parts[5]]
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
            commit = commit_of(parts[5])
            address = f"{self.server.endpoint}/{'/'.join(parts[2:4])}/commit/{commit}"
            answer = {"success": True, "commitOid": commit, "commitUrl": address}
        return self.reply(200, json.dumps(answer).encode())

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[self.path.rsplit("/", 1)[1]] = data
        self.reply(200, b"", {"ETag": '"done"'})

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
