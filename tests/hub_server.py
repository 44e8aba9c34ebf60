"""A hub on this machine: as much of the Hugging Face Hub's HTTP as huggingface_hub asks for, and its ways to fail.

/api/models/REPO[/revision/REV]      what a revision means, and its files with sizes and digests
/api/models/REPO/tree/COMMIT         the listing that snapshot_download reads
/REPO/resolve/COMMIT/FILE            a file: small ones here, large ones by a redirect to the "CDN"
/api/datasets/REPO, /datasets/REPO/resolve: the same of data sets, kept as `datasets/REPO`
/cdn/SHA256                          on another host name of this machine, without anybody's token
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 20_000  # bytes from which a file is kept as the hub keeps large ones: by its SHA-256, on the CDN


@dataclass(frozen=True)
class Asked:
    """One request: its method and path, who asked (Authorization), from which byte on (Range)."""

    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """What the hub has, and how it fails. `repositories`: name → commit → file → content."""

    url: str = ""
    cdn_url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    # a part of a path → (status, headers) instead of an answer
    failures: dict[str, tuple[int, Mapping[str, str]]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(
        default_factory=dict
    )  # a part of a path → bytes to send, request by request
    listed_sizes: dict[str, int] = field(default_factory=dict)  # file → what the listing says instead
    spoiled: set[str] = field(default_factory=set)  # files whose bytes are not those of the listing
    silent: bool = False  # takes the connection, and says nothing
    asked: list[Asked] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # path → bytes of files sent, all requests together

    def add(self, name: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """Keeps files as a new commit that `revision` means from now on; returns the commit."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        self.repositories.setdefault(name, {})[commit] = dict(files)
        self.revisions.setdefault(name, {})[revision] = commit
        return commit

    def paths(self) -> list[str]:
        return [request.path for request in self.asked]


def _listed(hub: Hub, name: str, content: bytes) -> dict[str, Any]:
    size = hub.listed_sizes.get(name, len(content))
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}
    return {"size": size, "lfs": lfs} if len(content) >= LARGE else {"size": size}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.asked.append(Asked(self.command, path, self.headers["Authorization"], self.headers["Range"]))
        while hub.silent:
            time.sleep(0.01)
        failure = next((fault for part, fault in hub.failures.items() if part in path), None)
        if failure is not None:
            self._say(failure[0], b"", failure[1])
        elif path.startswith("/cdn/"):
            self._file(path, self._content_of(path.removeprefix("/cdn/")), {})
        elif path.startswith("/api/models/"):
            self._api("", path.removeprefix("/api/models/"))
        elif path.startswith("/api/datasets/"):
            self._api("datasets/", path.removeprefix("/api/datasets/"))
        else:
            self._resolve(path)

    def _api(self, kind: str, path: str) -> None:
        name = "/".join(path.split("/")[:2])
        _, _, rest = path.removeprefix(name).lstrip("/").partition("/")
        name = kind + name
        commit = self._commit(name, rest or "main")
        if commit is None:
            return
        files = self.hub.repositories[name][commit]
        listed = {file: _listed(self.hub, file, content) for file, content in files.items()}
        if "/tree/" in path:
            oid = hashlib.sha1(commit.encode()).hexdigest()
            self._json(
                [{"type": "file", "path": file, "oid": oid, **entry} for file, entry in listed.items()]
            )
        else:
            siblings = [{"rfilename": file, **entry} for file, entry in listed.items()]
            self._json({"id": name, "sha": commit, "siblings": siblings})

    def _commit(self, name: str, revision: str) -> str | None:
        """The commit that is meant; without one, the refusal is said."""
        if name not in self.hub.repositories:
            self._say(404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        known = self.hub.revisions[name] | {commit: commit for commit in self.hub.repositories[name]}
        if revision not in known:
            self._say(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return known.get(revision)

    def _resolve(self, path: str) -> None:
        name, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = self._commit(name, revision)
        if commit is None:
            return
        content = self.hub.repositories[name][commit].get(file)
        if content is None:
            self._say(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": commit}
        if len(content) < LARGE:
            self._file(path, content, headers)
            return
        size = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        spoiled = "spoiled-" if file in self.hub.spoiled else ""
        self._say(302, b"", {**headers, **size, "Location": f"{self.hub.cdn_url}/cdn/{spoiled}{digest}"})

    def _content_of(self, digest: str) -> bytes:
        commits = [files for kept in self.hub.repositories.values() for files in kept.values()]
        contents = (content for files in commits for content in files.values())
        wanted = digest.removeprefix("spoiled-")
        found = next(content for content in contents if hashlib.sha256(content).hexdigest() == wanted)
        return found if wanted == digest else bytes(len(found))

    def _file(self, path: str, content: bytes, headers: Mapping[str, str]) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = content[start:]
        ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        cuts = next((cuts for name, cuts in self.hub.cuts.items() if name in path), None)
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self._say(206 if start else 200, part, {**headers, **ranged}, cut=cut)
        if self.command == "GET":
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(part[:cut])

    def _json(self, value: Any) -> None:
        self._say(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _say(self, status: int, content: bytes, headers: Mapping[str, str], cut: int | None = None) -> None:
        """A whole answer; with `cut`, so many bytes of it and then no connection any more."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
            self.wfile.flush()
        self.close_connection = cut is not None

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        hub.cdn_url = f"http://localhost:{server.server_address[1]}"
        yield hub
        hub.silent = False
        server.shutdown()
        thread.join()
