"""A Hugging Face hub on this machine: the part of its protocol that the real client needs, and faults on demand."""

import contextlib
import functools
import hashlib
import io
import math
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

RESOLVE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
STORE = re.compile(r"/store/(?P<repo>.+)/(?P<revision>[0-9a-f]{40})/(?P<file>[^/]+)")


class Request(NamedTuple):
    method: str
    repo: str
    revision: str
    file: str
    range: str | None


class Hub:
    """`with Hub() as hub`: serves at `hub.url` the files that were added, and records every request.

    A repository is called "owner/name", and "datasets/owner/name" if it holds data.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes | Path]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.renamed = {"distilbert-base-uncased": "distilbert/distilbert-base-uncased"}
        self.requests: list[Request] = []
        self.after: Callable[[Request], None] = lambda request: None  # called once the answer is sent
        self.stopped = threading.Event()
        self._faults: list[list] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, self))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self.stopped.is_set():
            self.stopped.set()
            self._server.shutdown()
            self._server.server_close()

    stop = __exit__

    def add(self, repo: str, files: dict[str, bytes | Path], branch: str = "main") -> str:
        """A new commit at the tip of a branch. Returns its hash."""
        commits = self.commits.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def fault(self, kind: str, method: str | None = None, file: str | None = None, times: float = math.inf) -> None:
        """The next `times` requests for "repository/file", or for everything, go wrong.

        "cut": the connection breaks half-way through the file. "silent": no answer at all. "500": an error of the server.
        "portal": a page that wants you to log in to the hotel's network. "later": 429, try again in an hour.
        "circle": redirects to itself. "stall": half of the file, and then nothing. "trickle": a byte now and then.
        "other": as many other bytes. "longer": more bytes than were promised. "endless": bytes without end. "bomb": a little
        gzip that becomes 256 MB.
        """
        self._faults.append([kind, method, file, times])

    def heal(self) -> None:
        self._faults.clear()

    def take_fault(self, method: str, file: str) -> str | None:
        for fault in self._faults:
            if fault[1] in (None, method) and fault[2] in (None, file) and fault[3] > 0:
                fault[3] -= 1
                return fault[0]
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *arguments: object) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        match = STORE.fullmatch(self.path) or RESOLVE.fullmatch(self.path)
        parts = match.groupdict() if match else {"repo": "", "revision": "", "file": self.path}
        request = Request(
            self.command, parts["repo"], unquote(parts["revision"]), unquote(parts["file"]), self.headers["Range"]
        )
        if match:
            self.hub.requests.append(request)
        repo, revision, file = request[1:4]
        fault = self.hub.take_fault(self.command, f"{repo}/{file}")
        if fault == "silent":
            self.hub.stopped.wait(120)
            self.close_connection = True
        elif fault == "500":
            self.refuse(500, None)
        elif fault == "later":
            self.send(429, {"Retry-After": "3600"})
        elif fault == "circle":
            self.send(302, {"Location": self.path})
        elif fault == "portal":
            self.send(200, {}, b"<html>Room number, please</html>")
        elif not match:
            self.refuse(404, None)
        elif repo in self.hub.renamed:
            self.send(307, {"Location": self.path.replace(repo, self.hub.renamed[repo], 1)})
        elif match.re is STORE:
            self.send_file(self.hub.commits[repo][revision][file], {}, fault)
        else:
            self.resolve(repo, revision, file, fault)
        self.hub.after(request)

    def resolve(self, repo: str, revision: str, file: str, fault: str | None) -> None:
        if repo not in self.hub.commits:
            return self.refuse(401, "RepoNotFound")  # not 404, which would reveal the names of private repositories
        commit = self.hub.branches[repo].get(revision, revision)
        if commit not in self.hub.commits[repo]:
            return self.refuse(404, "RevisionNotFound")
        headers = {"X-Repo-Commit": commit}
        if file not in self.hub.commits[repo][commit]:
            return self.refuse(404, "EntryNotFound", headers)
        content = self.hub.commits[repo][commit][file]
        if isinstance(content, bytes):
            return self.send_file(content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, fault)
        # A large file lies in a store, on another host, to which the client takes no credentials.
        headers |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(content.stat().st_size)}
        self.send(302, headers | {"Location": f"http://localhost:{self.hub.port}/store/{repo}/{commit}/{quote(file)}"})

    def send_file(self, content: bytes | Path, headers: dict[str, str], fault: str | None) -> None:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(wanted[1]) if wanted else 0
        if start >= size > 0:
            return self.refuse(416, None, {"Content-Range": f"bytes */{size}"})
        if fault in ("endless", "bomb") and self.command == "GET":
            return self.send_without_end(fault)
        if fault == "longer":
            size += 1000
        if wanted:
            headers = headers | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}
        self.send(206 if wanted else 200, headers | {"Content-Length": str(size - start), "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
            source.seek(start)
            if fault in ("cut", "stall"):
                self.wfile.write(source.read(max(0, size // 2 - start)))
                self.wfile.flush()
                self.close_connection = True
                if fault == "stall":
                    self.hub.stopped.wait(120)
            elif fault == "trickle":
                while (byte := source.read(1)) and not self.hub.stopped.wait(0.2):
                    self.wfile.write(byte)
            elif fault in ("other", "longer"):
                self.wfile.write(bytes(size - start))
            else:
                shutil.copyfileobj(source, self.wfile, 1 << 20)

    def send_without_end(self, fault: str) -> None:
        """Without a length, until the client hangs up."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Connection", "close")
        if fault == "bomb":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        packer = zlib.compressobj(wbits=31)
        with contextlib.suppress(OSError):
            for _ in range(256) if fault == "bomb" else iter(int, 1):
                self.wfile.write(packer.compress(bytes(1 << 20)) if fault == "bomb" else bytes(1 << 16))
            self.wfile.write(packer.flush())

    def refuse(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
        self.send(status, (headers or {}) | ({"X-Error-Code": code, "X-Error-Message": f"{code}."} if code else {}))

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@functools.cache
def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
