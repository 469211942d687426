"""A server on this machine that speaks the part of the Hub's HTTP API that huggingface_hub uses to fetch models.

Small files are given out by the Hub itself, with the ETag that git has for them; files stored with Git LFS by a
redirect to another host, with a signature in the address and without a token, and ranges of them. Xet is not offered.
Source: huggingface_hub 2.4, `hf_api.model_info`, `file_download.get_hf_file_metadata` and `http_get`.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

TOKEN: Final = "hf_a_token_that_must_not_be_shown"
SIGNATURE: Final = "a-signature-that-must-not-be-shown"
_LFS: Final = (".bin", ".safetensors", ".model", ".gguf", ".pth")


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int
    """Bytes of the body."""

    @property
    def file(self) -> str:
        """The name of the file asked for; empty if it was none."""
        found = re.search(r"/(?:resolve|cdn)/[^/]+/([^?]+)", self.path)
        return found[1] if found else ""


Fault = Callable[["Handler"], bool]
"""Looks at a request, and answers it if it wants to; True if it did."""


@dataclass
class Hub:
    """What the server has, what it does wrong, and what it was asked."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """By repository and commit: files by name."""
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    """By repository: commits by branch or tag."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    def publish(self, repo: str, directory: Path, more: Mapping[str, bytes] | None = None) -> str:
        """Make a commit of the files in a directory and of ``more``, have "main" name it, and return its hash."""
        files = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        content = {name: path.read_bytes() for name, path in files.items()} | dict(more or {})
        commit = hashlib.sha1(repr(sorted((name, sha256(data)) for name, data in content.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = content
        self.refs.setdefault(repo, {})["main"] = commit
        return commit

    def bodies(self) -> dict[str, int]:
        """How many bytes of each file were given out."""
        given: dict[str, int] = {}
        for request in self.requests:
            if request.file and request.sent:
                given[request.file] = given.get(request.file, 0) + request.sent
        return given

    def forget(self) -> None:
        self.requests.clear()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def etag(name: str, data: bytes) -> str:
    """What the Hub has: the SHA-256 of an LFS file, the git object's SHA-1 of any other."""
    return sha256(data) if name.endswith(_LFS) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if any(fault(self) for fault in self.hub.faults):
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision/(.+)|refs)", path):
            repo = found[1]
            if repo not in self.hub.commits:
                self.refuse(401, "RepoNotFound")
            elif found[2] == "refs":
                refs = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in self.hub.refs[repo].items()]
                self.reply(json.dumps({"branches": refs, "tags": [], "converts": []}).encode())
            else:
                self._describe(repo, found[3])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
            self.give_range(self._by_digest(found[1], found[2]))
        else:
            self.refuse(404, "")

    def _commit(self, repo: str, revision: str) -> str | None:
        commit = self.hub.refs[repo].get(revision, revision)
        return commit if commit in self.hub.commits[repo] else None

    def _describe(self, repo: str, revision: str) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        siblings: list[Mapping[str, Any]] = []
        for name, data in self.hub.commits[repo][commit].items():
            lfs = (
                {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}} if name.endswith(_LFS) else {}
            )
            siblings.append({"rfilename": name, "size": len(data), "blobId": "0" * 40, **lfs})
        self.reply(json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self._commit(repo, revision)
        data = self.hub.commits[repo].get(commit or "", {}).get(name)
        if data is None:
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit or "", "ETag": f'"{etag(name, data)}"'}
        if name.endswith(_LFS):
            headers |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            place = f"{self.hub.address.replace('127.0.0.1', 'localhost')}/cdn/{sha256(data)}/{name}"
            self.reply(b"", 302, headers | {"Location": f"{place}?Signature={SIGNATURE}"})
        else:
            self.reply(data, 200, headers)

    def _by_digest(self, digest: str, name: str) -> bytes:
        commits = (files for repo in self.hub.commits.values() for files in repo.values())
        return next(files[name] for files in commits if name in files and sha256(files[name]) == digest)

    def give_range(self, data: bytes, *, most: int | None = None) -> None:
        """Give out what the Range asks for, or all; the connection ends after ``most`` bytes of it."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(found[1]) if found else 0
        last = int(found[2]) if found and found[2] else len(data) - 1
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if found else {}
        self.reply(data[first : last + 1], 206 if found else 200, headers, most=most)

    def refuse(self, status: int, code: str, message: str = "refused") -> None:
        self.reply(b"{}", status, {"X-Error-Code": code, "X-Error-Message": message})

    def reply(
        self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None, *, most: int | None = None
    ) -> None:
        self.send_response(status)
        named = {"Content-Disposition": f'inline; filename="{urlsplit(self.path).path.rpartition("/")[2]}";'}
        for name, value in {"Content-Length": str(len(body)), **named, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        sent = body[:most]
        request = Request(
            self.command, self.path, self.headers.get("Range"), self.headers.get("Authorization"), len(sent)
        )
        self.hub.requests.append(request)
        self.wfile.write(sent)
        if len(sent) < len(body):
            self.close_connection = True


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub without repositories, until the body ends."""
    hub = Hub()
    handler = type("Handler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


# what it can do wrong


def answers(status: int, code: str = "", *, to: str, message: str = "refused") -> Fault:
    """Refuse every request whose path has ``to`` in it."""

    def fault(handler: Handler) -> bool:
        if to in handler.path:
            handler.refuse(status, code, message)
            return True
        return False

    return fault


def cuts(name: str, *, times: int) -> Fault:
    """End the connection half-way through a file, so many times."""
    left = [times]

    def fault(handler: Handler) -> bool:
        found = re.search(r"/cdn/([0-9a-f]{64})/([^?]+)", handler.path)
        if not found or found[2] != name or handler.command != "GET" or not left[0]:
            return False
        left[0] -= 1
        data = handler._by_digest(found[1], name)
        handler.give_range(data, most=len(data) // 2)
        return True

    return fault
