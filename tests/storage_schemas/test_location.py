"""Folders through fsspec: whole files or none, and errors that name the URL."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from storage_schemas import Cache, Location, UserError
from storage_schemas.access.redaction import redact
from storage_schemas.access.retries import is_transient, retry
from tests.support.refusals import refused


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "local":
        yield Location(tmp_path / "deep" / "er")
        return
    yield Location("memory://location-tests/deep/er")
    files = fsspec.filesystem("memory")
    if files.exists("/location-tests"):
        files.rm("/location-tests", recursive=True)


def test_every_file_system_behaves_alike(location: Location) -> None:
    assert not location.exists()
    assert location.names() == []
    assert location.names("nowhere") == []
    location.write("b/two", b"0123456789")
    location.write("a", b"")
    location.write("b/one", b"x")
    location.write("b/two", b"9876543210")
    assert location.exists()
    assert location.exists("b/two")
    assert not location.exists("b/three")
    assert location.names() == ["a", "b"]
    assert location.names("b") == ["one", "two"]
    assert location.read("b/two") == b"9876543210"
    assert location.read("b/two", 2, 5) == b"765"
    assert location.read("a") == b""
    assert location.size("b/two") == 10
    location.remove("b/two")
    assert location.names("b") == ["one"]
    for read in (location.read, location.size):
        with pytest.raises(FileNotFoundError):
            read("b/two")


def test_a_location_can_be_pickled(location: Location) -> None:
    location.write("a", b"text")
    copy = pickle.loads(pickle.dumps(location))
    assert copy.read("a") == b"text"
    assert copy.url == location.url


def test_local_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = Location(tmp_path)
    location.write("f", b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(KeyboardInterrupt):
            location.write("f", b"new and longer")
    assert location.read("f") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        Location(tmp_path).write("f", b"new")
    assert caught.value.filename == str(tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Other accounts read published artifacts, but temporary files are private by default."""
    before = os.umask(umask)
    try:
        Location(tmp_path).write("f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


def test_names_of_the_maximal_length_are_written(tmp_path: Path) -> None:
    Location(tmp_path).write("f" * 255, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["f" * 255]


@pytest.mark.parametrize("name", ["a::b", "zip::a", "a#b?c=d", "a%20b", "~no-such-user", "-", "a b", "c:x"])
def test_local_paths_are_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """fsspec takes some of them for chains of two file systems, and would use the folder before the colons."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for place in (name, str(tmp_path / name), f"file://{tmp_path / name}"):
        Location(place).write("f", place.encode())
        assert (tmp_path / name / "f").read_bytes() == place.encode()
        assert Location(place).url == redact(place)
    parent, last = Location(name).split()
    assert (parent.root, last) == (str(tmp_path), name)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Location("~/x").write("f", b"x")
    assert (tmp_path / "x" / "f").read_bytes() == b"x"
    monkeypatch.delenv("HOME")
    Location("~/x")


def test_relative_paths_are_resolved_when_a_location_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in pickled copies, for workers with another working directory."""
    for folder in ("here", "there"):
        (tmp_path / folder / "x" / "y").mkdir(parents=True)
        (tmp_path / folder / "x" / "f").write_text(folder)
        (tmp_path / folder / "x" / "y" / "f").write_text(f"{folder} below")
    monkeypatch.chdir(tmp_path / "here")
    location, cache = Location("x"), Cache(Path("cache"), 100)
    sent = pickle.dumps((location, cache))
    monkeypatch.chdir(tmp_path / "there")
    for place in (location, pickle.loads(sent)[0]):
        assert place.read("f") == b"here"
        assert place.below("y").read("f") == b"here below"
        assert place.split()[0].read("x/f") == b"here"
        assert (place.url, place.below("y").url, place.split()[0].url) == ("x", "x/y", ".")
    assert pickle.loads(sent)[1].folder == tmp_path / "here" / "cache"


@pytest.mark.parametrize("name", ["x" * 256, "ü" * 128, "/".join(["x" * 200] * 25), "a\0b"], ids=len)
def test_impossible_paths_are_refused(name: str) -> None:
    with refused(UserError, None, "255", "4095") as caught:
        Location(name)
    assert len(str(caught.value)) < 300


def test_a_removed_working_directory_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with refused(UserError, None, "x: ", "removed"):
        Location("x")
    assert Location(tmp_path).names() == []


def test_relative_paths_and_trailing_slashes_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Location("here/").write("f", b"x")
    assert (tmp_path / "here" / "f").read_bytes() == b"x"
    assert Location("./here").names() == ["f"]
    assert Location("./here").is_local


@pytest.mark.parametrize("url", ["nosuch://bucket/x", "no-driver://x"])
def test_an_unknown_protocol_is_the_users_error(url: str) -> None:
    with refused(UserError, None, f"{url}: "):
        Location(url)


@pytest.mark.parametrize(
    ("url", "driver", "hint"),
    [
        ("s3://bucket/a", "s3fs", "pip install 'datamerge[s3]'"),
        ("gs://bucket/a", "gcsfs", "pip install 'datamerge[gcs]'"),
        ("https://host/a", "aiohttp", "pip install 'datamerge[http]'"),
        ("abfs://container/a", "adlfs", "adlfs"),
    ],
)
def test_a_missing_driver_is_named_with_the_way_to_install_it(url: str, driver: str, hint: str) -> None:
    """Run in a process that cannot import the driver, even if it is installed here."""
    code = (
        f"import sys; sys.modules[{driver!r}] = None\n"
        f"import sys, datamerge.cli; sys.argv = ['datamerge', 'inspect', {url!r}]; datamerge.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert hint in done.stderr


def test_split_gives_the_folder_and_the_name_of_a_file(tmp_path: Path) -> None:
    folder, name = Location(tmp_path / "in" / "a.parquet").split()
    assert (folder.root, name) == (str(tmp_path / "in"), "a.parquet")
    assert Location("memory://a/b.parquet").split()[0].url == "memory://a"
    assert Location("b.parquet").split()[1] == "b.parquet"


def test_errors_are_transient_or_permanent() -> None:
    class Answer(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    def boto(status: int) -> Exception:
        error = OSError(errno.EIO, "translated")
        error.__cause__ = Exception()
        error.__cause__.response = {"ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
        return error

    class ClientPayloadError(Exception):
        pass

    transient = [TimeoutError(), ConnectionResetError(), ClientPayloadError(), OSError(errno.EBUSY, "slow down")]
    permanent = [FileNotFoundError(), PermissionError(), ValueError(), OSError(errno.EINVAL, "no"), Answer(404)]
    transient += [make(status) for make in (Answer, boto) for status in (408, 429, 500, 502, 503, 504)]
    permanent += [make(status) for make in (Answer, boto) for status in (400, 401, 403, 404, 409, 412, 416, 501)]
    assert [error for error in transient if not is_transient(error)] == []
    assert [error for error in permanent if is_transient(error)] == []


def test_retry_takes_a_classifier_and_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    failures = [KeyError("one"), KeyError("two")]

    def fail_twice() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert retry(fail_twice, transient=lambda error: isinstance(error, KeyError), delays=(1.0, 2.0)) == "done"
    assert waits == [1.0, 2.0]
    failures = [KeyError(str(number)) for number in range(9)]
    with pytest.raises(KeyError):
        retry(fail_twice, transient=lambda error: True, delays=(1.0,))
    assert len(failures) == 7


def test_permanent_errors_are_not_retried() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("no use")

    with pytest.raises(ValueError, match="no use"):
        retry(fail)
    assert len(calls) == 1
