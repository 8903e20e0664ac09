"""A local stand-in of the Hugging Face Hub's HTTP interface, as far as huggingface_hub uses it for repositories."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.data.hub import dataset_files
from flacuna_jax.hub import fetch

TOKEN, READ_ONLY, USER = "hf_write", "hf_read", "ann"
LARGE = 2000
"""Files from this size on are stored as the Hub stores large files: a redirect leads to them."""


@dataclass
class Repository:
    """Branches with their files; `gated` and `private` ones need a token."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    gated: bool = False
    private: bool = False
    commits: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        """The commit of a branch or commit; it is a hash of the files."""
        of_branch = {name: _commit(files) for name, files in self.branches.items()}
        return of_branch.get(revision) or (revision if revision in of_branch.values() else None)

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit_of(revision)
        return next(files for files in self.branches.values() if _commit(files) == commit)


def _commit(files: dict[str, bytes]) -> str:
    digests = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(files.items())]
    return hashlib.sha1(repr(digests).encode()).hexdigest()


@dataclass
class Hub:
    """The state of the stand-in.

    Attributes:
      url: its address.
      repositories: by kind ("model", "dataset") and name.
      requests: "METHOD PATH" of every request, in order.
      interruptions: for the next transfers of large files: the number of bytes after which the connection ends.
      refuse: part of the path of requests that are answered with status 500.
    """

    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    interruptions: list[int] = field(default_factory=list)
    refuse: str | None = None

    def add(self, name: str, source: Path | dict[str, bytes], kind: str = "model", **options: bool) -> Repository:
        """Adds a repository with the files of a directory."""
        files = source if isinstance(source, dict) else read_files(source)
        self.repositories[kind, name] = made = Repository({"main": files}, **options)
        return made

    def downloaded(self) -> list[str]:
        """The paths of the files that were asked for, sorted."""
        paths = {line.partition("/resolve/")[2].partition("/")[2] for line in self.requests}
        return sorted(paths - {""})


def read_files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield hub
        server.shutdown()


@contextlib.contextmanager
def hub_for_client(directory: Path) -> Iterator[Hub]:
    """A stand-in that huggingface_hub talks to in this process, with an empty cache in `directory` and no token."""
    from huggingface_hub import constants

    remembered = (fetch, dataset_files)
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(directory / "hub_cache"),
            "HF_TOKEN_PATH": str(directory / "no_token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # another protocol, for which there is no stand-in
        }
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.delenv("HF_TOKEN", raising=False)
        for function in remembered:
            function.cache_clear()
        yield hub
        for function in remembered:
            function.cache_clear()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = (
            self._chunks() if self._is_chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        )
        if self.hub.refuse and self.hub.refuse in path:
            self._send(500, {"error": "out of order"})
            return
        for methods, pattern, answer in self._routes:
            if self.command in methods and (found := re.fullmatch(pattern, path)):
                answer(self, *found.groups())
                return
        self._send(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    @property
    def _is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding") == "chunked"

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repository(self, kind: str, name: str, revision: str, *, files: bool = False) -> Repository | None:
        """The repository, or None after an answer with an error."""
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and not self._token):
            self._send(404 if self._token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if found.commit_of(revision) is None:
            self._send(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            return None
        if files and found.gated and self._token != TOKEN:
            self._send(403 if self._token else 401, {"error": "gated"}, X_Error_Code="GatedRepo")
            return None
        return found

    def _info(self, kind: str, name: str, revision: str | None = None) -> None:
        if (found := self._repository(kind, name, revision or "main")) is None:
            return
        siblings = [{"rfilename": path, "size": len(data)} for path, data in found.files(revision or "main").items()]
        commit = found.commit_of(revision or "main")
        self._send(200, {"id": name, "sha": commit, "private": found.private, "tags": [], "siblings": siblings})

    def _tree(self, kind: str, name: str, revision: str) -> None:
        if (found := self._repository(kind, name, revision)) is None:
            return
        entries = []
        for path, data in found.files(revision).items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if len(data) >= LARGE:
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._send(200, entries)

    def _resolve(self, prefix: str | None, name: str, revision: str, path: str) -> None:
        if (found := self._repository("dataset" if prefix else "model", name, revision, files=True)) is None:
            return
        commit, data = str(found.commit_of(revision)), found.files(revision).get(path)
        if data is None:
            self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif len(data) < LARGE:
            self._send(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)
        else:
            digest = hashlib.sha256(data).hexdigest()
            self.hub.large[digest] = data
            linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(data)), "X_Repo_Commit": commit}
            # The client follows redirects to the same host itself; the Hub's storage has another one.
            storage = self.hub.url.replace("127.0.0.1", "localhost")
            self._send(302, b"", Location=f"{storage}/large/{digest}", **linked)

    def _content(self, digest: str) -> None:
        """A large file, or the range of it that a client still needs."""
        data, start = self.hub.large[digest], 0
        if asked := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or ""):
            start = int(asked[1])
            self.hub.ranges.append(asked[0])
        headers = {"ETag": f'"{digest}"', "Accept_Ranges": "bytes", "Content_Length": str(len(data) - start)}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        stop = len(data)
        if self.hub.interruptions and self.command == "GET":
            stop = start + self.hub.interruptions.pop(0)
            self.close_connection = True
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:stop])

    def _whoami(self) -> None:
        if self._token not in (TOKEN, READ_ONLY):
            self._send(401, {"error": "Invalid username or password."})
            return
        role = "write" if self._token == TOKEN else "read"
        self._send(200, {"name": USER, "auth": {"accessToken": {"role": role}}})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if ("model", name) in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories["model", name] = Repository({"main": {".gitattributes": b""}}, private=private)
        self._send(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _branch(self, name: str, branch: str) -> None:
        found = self.hub.repositories["model", name]
        if branch in found.branches:
            self._send(409, {"error": "Reference already exists"})
            return
        found.branches[branch] = dict(found.branches["main"])
        self._send(200, {})

    def _preupload(self, name: str, revision: str) -> None:
        modes = [
            {"path": one["path"], "uploadMode": "lfs" if one["size"] >= LARGE else "regular", "shouldIgnore": False}
            for one in json.loads(self.body)["files"]
        ]
        self._send(200, {"files": modes})

    def _batch(self, name: str) -> None:
        objects = [
            {
                **one,
                "actions": {
                    "upload": {"href": f"{self.hub.url}/store/{one['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify"},
                },
            }
            for one in json.loads(self.body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _store(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.large[digest] = self.body
        self._send(200)

    def _verify(self) -> None:
        asked = json.loads(self.body)
        self._send(200 if len(self.hub.large[asked["oid"]]) == asked["size"] else 422, {})

    def _validate(self) -> None:
        base = re.search(r"^base_model: (.*)$", json.loads(self.body)["content"], re.MULTILINE)
        if base and not re.fullmatch(r'"?[\w-][\w.-]*(/[\w.-]+)?"?', base[1]):
            message = f'"base_model" with value {base[1]} is not valid. Use a model id from https://hf.co/models.'
            self._send(400, {"errors": [{"message": message}], "warnings": []})
            return
        self._send(200, {"errors": [], "warnings": []})

    def _write(self, name: str, revision: str) -> None:
        found = self.hub.repositories["model", name]
        files = found.branches[revision]
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    found.commits.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        commit = found.commit_of(revision)
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{name}/commit/{commit}"})

    def _model(self, *arguments: str) -> None:
        self._info("model", *arguments)

    def _dataset(self, *arguments: str) -> None:
        self._info("dataset", *arguments)

    _routes = (
        (("GET",), r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", _model),
        (("GET",), r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", _dataset),
        (("GET",), r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/(.+)", _tree),
        (("GET", "HEAD"), r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
        (("GET", "HEAD"), r"/large/(\w+)", _content),
        (("GET",), r"/api/whoami-v2", _whoami),
        (("POST",), r"/api/repos/create", _create),
        (("POST",), r"/api/models/([^/]+/[^/]+)/branch/(.+)", _branch),
        (("POST",), r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _preupload),
        (("POST",), r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        (("PUT",), r"/store/(\w+)", _store),
        (("POST",), r"/verify", _verify),
        (("POST",), r"/api/validate-yaml", _validate),
        (("POST",), r"/api/models/([^/]+/[^/]+)/commit/(.+)", _write),
    )
