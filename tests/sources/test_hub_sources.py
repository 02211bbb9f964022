"""`hf://` URLs through huggingface_hub, against a server that answers like the Hub: revisions, splits, one file."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfFileSystem, constants

from datamerge.sources import open_source
from storage_schemas import ConfigError, SourceError, open_artifact
from tests.support.artifacts import assert_same
from tests.support.paths import GOLDEN
from tests.support.refusals import refused
from tests.support.small_sources import photo, put, table

REPO = "datasets/ORG/NAME"
REVISIONS = ("main", "v1.0", "refs/convert/parquet")


class _Hub(BaseHTTPRequestHandler):
    """Serves one repository; each revision is a folder."""

    folder: Path
    requested: list[str]

    def _locate(self, prefix: str) -> tuple[str, Path] | None:
        """Revision and file of the request, whose path begins with this prefix."""
        path = unquote(urlsplit(self.path).path)
        rest = path.removeprefix(prefix)
        revision = next((name for name in REVISIONS if f"{rest}/".startswith(f"{name}/")), None)
        if rest == path or revision is None:
            return None
        self.requested.append(revision)
        return revision, self.folder / revision / rest[len(revision) + 1 :]

    def do_GET(self) -> None:
        if self.path == f"/api/{REPO}" or self._locate(f"/api/{REPO}/revision/"):
            self._answer({"id": "ORG/NAME", "sha": "0" * 40, "siblings": [], "private": False})
        elif (found := self._locate(f"/api/{REPO}/tree/")) and found[1].is_dir():
            below = found[1].rglob("*") if "recursive=true" in self.path else found[1].iterdir()
            self._answer([self._entry(path, found[0]) for path in sorted(below)])
        elif (found := self._locate(f"/{REPO}/resolve/")) and found[1].is_file():
            self._file(found[1].read_bytes())
        else:
            self._answer({"error": "Entry not found"}, 404)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def do_POST(self) -> None:
        found = self._locate(f"/api/{REPO}/paths-info/")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else [unquote(body.partition("paths=")[2])]
        assert found is not None
        entries = [found[1] / path for path in paths]
        self._answer([self._entry(path, found[0]) for path in entries if path.exists()])

    def _entry(self, path: Path, revision: str) -> dict[str, Any]:
        name = path.relative_to(self.folder / revision).as_posix()
        kind = "directory" if path.is_dir() else "file"
        return {"type": kind, "path": name, "size": path.stat().st_size, "oid": "0" * 40}

    def _file(self, data: bytes) -> None:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("ETag", '"x"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(part)

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A running server; its revisions differ by the label of their images."""
    for label, revision in enumerate(REVISIONS):
        for split, count in (("train", 3), ("test", 2)):
            file = tmp_path / revision / f"data/{split}-00000-of-00001.parquet"
            table(file, image=[photo()] * count, label=[label] * count)
        put(tmp_path / revision, "README.md", ".gitattributes", data=b"text")
    handler = type("Hub", (_Hub,), {"folder": tmp_path, "requested": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    yield handler
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("at", "label"),
    [("", 0), ("@main", 0), ("@v1.0", 1), ("@refs/convert/parquet", 2), ("@refs%2Fconvert%2Fparquet", 2)],
)
@pytest.mark.parametrize("rest", ["", "/data", "/data/train-*.parquet", "/data/train-00000-of-00001.parquet"])
def test_a_revision_and_a_split_are_read(hub: type[_Hub], at: str, label: int, rest: str) -> None:
    url = f"hf://{REPO}{at}{rest}"
    source = open_source(url, split=None if "train" in rest else "train")
    assert [sample.label for sample in source.samples] == [label] * 3
    assert source.samples[0].name == f"{'data/' if not rest else ''}train-00000-of-00001.parquet#0"
    assert source.reader.read(source.samples[2]) == photo()
    assert source.url == url
    assert set(hub.requested) == {REVISIONS[label]}
    if not rest:
        assert source.left_out == {".md": 1, "hidden": 1}


@pytest.mark.parametrize(("at", "artifact"), [("", "zarr-float32-bare"), ("@v1.0", "webdataset-float32-full")])
def test_an_artifact_is_opened_at_a_revision(hub: type[_Hub], at: str, artifact: str) -> None:
    shutil.copytree(GOLDEN / "v1/zarr-float32-bare", hub.folder / "main/adv")
    shutil.copytree(GOLDEN / "v1/webdataset-float32-full", hub.folder / "v1.0/adv")
    found, expected = open_artifact(f"hf://{REPO}{at}/adv"), open_artifact(GOLDEN / "v1" / artifact)
    assert found.manifest == expected.manifest
    assert found.location.url == f"hf://{REPO}{at}/adv"
    for index, record in enumerate(expected):
        assert_same(found[index], record)


def test_several_splits_are_refused_with_the_list(hub: type[_Hub]) -> None:
    with refused(ConfigError, "split", f"hf://{REPO}@v1.0", "train (1 Parquet file)", "test (1 Parquet file)"):
        open_source(f"hf://{REPO}@v1.0")


def test_missing_paths_are_refused(hub: type[_Hub]) -> None:
    for url in (f"hf://{REPO}/nothing", f"hf://{REPO}/data/no-*.parquet"):
        with refused(SourceError, None, url, "nothing there"):
            open_source(url)
