"""A hub on this machine: the part of Hugging Face's interface that its own client uses (model info, tree with pages,
resolve with a redirect to another host name, ranges, ETags, LFS checksums, tokens), and whatever goes wrong.

    with HubServer() as hub:
        hub.add("owner/repo", {"model.gguf": data})
        hub.faults.append(Cut("model.gguf", after=1000))
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 1000  # from here on a file is large
PAGE = 3  # entries of a tree on a page


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str
    token: str = ""  # that must be sent
    is_gated: bool = False
    sent: dict[str, bytes] = field(default_factory=dict)  # what is sent instead of a file


@dataclass
class Fault:
    """Something that goes wrong with requests whose path ends in `ending`, `times` times."""

    ending: str
    times: int = 1
    after: int | None = None  # bytes, then the connection breaks
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    ignores_range: bool = False
    body: bytes = b"{}"  # of an answer with a status
    action: Callable[[], object] | None = None


@dataclass
class Seen:
    method: str
    path: str
    host: str
    range: str
    token: str
    sent_bytes: int = 0


class HubServer:
    """Listens on a free port. `address` is for HF_ENDPOINT; bytes are sent under another host name, as by a CDN."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.address = f"http://localhost:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **more: Any) -> Repo:
        digest = hashlib.sha1()
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        self.repos[name] = Repo(dict(files), digest.hexdigest(), **more)
        return self.repos[name]

    def take_fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if path.endswith(fault.ending) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None

    def file_bytes_sent(self) -> int:
        return sum(each.sent_bytes for each in self.seen if each.host.startswith("127.0.0.1"))


def checksum(data: bytes) -> str:
    """As the hub names a file's contents."""
    if len(data) >= LFS_BYTES:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):
            super().handle_one_request()
            return
        self.close_connection = True

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        seen = Seen(
            self.command,
            path,
            self.headers.get("Host", ""),
            self.headers.get("Range", ""),
            self.headers.get("Authorization", "").removeprefix("Bearer "),
        )
        self.hub.seen.append(seen)
        is_cdn = seen.host.startswith("127.0.0.1")
        fault = self.hub.take_fault(path) if is_cdn or path.startswith("/api") else None
        if fault and fault.action:
            fault.action()
        if fault and fault.status:
            self._send(fault.status, fault.body, fault.headers)
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), seen)
        elif is_cdn:
            self._bytes(path, seen, fault)
        else:
            self._resolve(path, seen)

    def _refuse(self, repo: Repo | None, seen: Seen) -> bool:
        """Answers what may not be seen, as the hub does: what is private is not there."""
        if repo is None or (repo.token and not repo.is_gated and seen.token != repo.token):
            status = 404 if seen.token else 401
            self._send(status, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})
            return True
        return False

    def _api(self, rest: str, seen: Seen) -> None:
        owner, name, *inside = rest.split("/")
        repo = self.hub.repos.get(f"{owner}/{name}")
        if self._refuse(repo, seen):
            return
        if inside[:1] == ["revision"] and inside[1] not in ("main", "dev", repo.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif inside[:1] in ([], ["revision"]):
            info = {"id": f"{owner}/{name}", "sha": repo.commit, "private": False, "siblings": [], "tags": []}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif inside[0] == "tree":
            self._tree(repo, rest)
        else:
            self._send(404, b"{}")

    def _tree(self, repo: Repo, rest: str) -> None:
        folders = {path.rpartition("/")[0] for path in repo.files if "/" in path}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
        for path, data in sorted(repo.files.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": "1" * 40}
            if len(data) >= LFS_BYTES:
                lfs = {"oid": checksum(data), "size": len(data), "pointerSize": 130}
                entry |= {"lfs": lfs}
            else:
                entry |= {"oid": checksum(data)}
            entries.append(entry)
        start = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + PAGE < len(entries):
            next_page = f"{self.hub.address}/api/models/{rest}?recursive=true&cursor={start + PAGE}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self._send(200, json.dumps(entries[start : start + PAGE]).encode(), headers)

    def _resolve(self, path: str, seen: Seen) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        repo = self.hub.repos.get(match[1]) if match else None
        if self._refuse(repo, seen):
            return
        if repo.is_gated and seen.token != repo.token:
            self._send(403 if seen.token else 401, b"Access is restricted", {"X-Error-Code": "GatedRepo"})
        elif match[3] not in repo.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
        else:
            data = repo.files[match[3]]
            location = f"http://127.0.0.1:{self.hub.port}/cdn/{match[1]}/{match[3]}?signature=1"
            headers = {"Location": location, "X-Repo-Commit": repo.commit, "X-Linked-Size": str(len(data))}
            self._send(302, b"", headers | {"X-Linked-ETag": f'"{checksum(data)}"'})

    def _bytes(self, path: str, seen: Seen, fault: Fault | None) -> None:
        _, _, owner, name, inside = path.split("/", 4)
        repo = self.hub.repos[f"{owner}/{name}"]
        data = repo.sent.get(inside, repo.files[inside])
        start, stop, status = 0, len(data), 200
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", seen.range)) and not (fault and fault.ignores_range):
            start, stop, status = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data)), 206
            stop = len(data) if not wanted[2] else stop
            if start >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
        self.send_response(status)
        self.send_header("Content-Length", str(stop - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.end_headers()
        sent = data[start:stop]
        if fault and fault.after is not None:
            sent = sent[: fault.after]
        with suppress(OSError):
            self.wfile.write(sent)
            seen.sent_bytes = len(sent)
            self.wfile.flush()
        if len(sent) < stop - start:
            self.close_connection = True

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
