"""Web servers and object stores that behave differently: the same bytes, or a one-line error that says what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest

from storage_schemas import ConfigError, Layout, Location, Record, SourceError, UserError, open_artifact
from storage_schemas.access import location as location_module
from tests.support.refusals import refused
from tests.support.servers import MANNERS, S3Server

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DATA = bytes(range(256)) * 40
SPANS = [(0, 100), (100, 300), (9_000, 20_000), (20_000, 30_000), (None, None), (0, len(DATA))]
Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]


@pytest.mark.parametrize("manner", MANNERS)
def test_every_server_gives_the_same_bytes(tmp_path: Path, web: Any, manner: str) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    web.manners, web.ranges = MANNERS[manner]
    place = Location(f"{web.url}?sig=SECRET")
    assert place.size("x") == len(DATA)
    for start, end in SPANS:
        assert place.read("x", start, end) == DATA[start or 0 : end], (start, end)
    with place.open("x") as stream:
        stream.seek(500)
        assert stream.read(10) == DATA[500:510]
    place.download("x", tmp_path / "copy", len(DATA))
    assert (tmp_path / "copy").read_bytes() == DATA


def test_an_empty_file_is_read(tmp_path: Path, web: Any) -> None:
    (tmp_path / "web" / "x").write_bytes(b"")
    for ranges in (True, False):
        web.ranges = ranges
        assert (Location(web.url).size("x"), Location(web.url).read("x")) == (0, b"")


@pytest.mark.parametrize("manner", ["redirect", "no length", "gzip when asked", "gzip, no length"])
def test_an_artifact_is_read_from_every_server(
    tmp_path: Path,
    web: Any,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    manner: str,
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout("webdataset"))
    web.manners, web.ranges = MANNERS[manner]
    for found, expected in zip(open_artifact(f"{web.url}/a"), records, strict=True):
        same_record(found, expected)


def test_ranges_of_compressed_bytes_are_refused(tmp_path: Path, web: Any) -> None:
    (tmp_path / "web" / "x").write_bytes(DATA)
    web.manners = {"gzip"}
    place = Location(f"{web.url}?sig=SECRET")
    with refused(UserError, None, f"{web.url}/x: ", "gzip", "copy") as caught:
        place.read("x", 100, 200)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("manner", ["no ranges", "no length, no ranges"])
def test_a_long_file_without_ranges_is_not_sent_for_each_part(
    tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    monkeypatch.setattr(location_module, "MOST_WHOLE", 5_000)
    (tmp_path / "web" / "x").write_bytes(DATA)
    web.manners, web.ranges = MANNERS[manner]
    place = Location(web.url)
    with refused(UserError, None, f"{web.url}/x: ", "byte ranges", "copy"):
        place.read("x", 100, 200)
    assert place.read("x") == DATA


def test_a_replaced_file_is_not_mixed_with_the_first(tmp_path: Path, web: Any) -> None:
    """Nor in a worker that received the pickled location."""
    for name in "xy":
        (tmp_path / "web" / name).write_bytes(DATA)
    tag = ['"1"']
    web.etag = lambda: tag[0]
    place = Location(f"{web.url}?sig=SECRET")
    stream = place.open("x")
    copy = pickle.loads(pickle.dumps(place))
    assert stream.read(10) == DATA[:10]
    tag[0] = '"2"'
    actions: list[Callable[[], Any]] = [
        lambda: place.read("x", 0, 10),
        lambda: copy.read("x"),
        lambda: copy.open("x"),
    ]
    for action in actions:
        with refused(SourceError, None, f"{web.url}/x: ", '"1"', '"2"') as caught:
            action()
        assert "SECRET" not in str(caught.value)
    assert place.read("y", 0, 10) == DATA[:10]
    assert Location(web.url).open("x").read(10) == DATA[:10]


def test_a_replaced_object_is_not_mixed_with_the_first(bucket: str) -> None:
    place = Location(bucket)
    place.write("x", DATA)
    stream = place.open("x")
    copy = pickle.loads(pickle.dumps(place))
    assert (stream.read(10), copy.read("x"), copy.read("x", 5, 9)) == (DATA[:10], DATA, DATA[5:9])
    assert copy.read("x", len(DATA) + 5, len(DATA) + 9) == b""
    place.write("x", DATA[::-1])
    actions: list[Callable[[], Any]] = [lambda: place.read("x", 5, 9), lambda: copy.read("x"), lambda: copy.open("x")]
    for action in actions:
        with refused(SourceError, None, f"{bucket}/x: "):
            action()
    assert Location(bucket).open("x").read(10) == DATA[::-1][:10]


# Names that mean something in a URL, in a pattern or to fsspec.
NAMES = ["a+b", "a%20b", "100%", "a b", "a#b", "a?b=c", "ünï", "日本", "a&b;c", "[a]", "~a", "a@b"]


@pytest.mark.parametrize("prefix", ["", "/s3"])
def test_object_keys_are_taken_literally(s3: S3Server, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Also behind an endpoint with a path, with or without a trailing slash."""
    s3.prefix = prefix
    bucket = f"s3://bucket-{uuid4().hex[:12]}"
    for slash in ["", "/"] if prefix else [""]:
        options = {"endpoint_url": f"{s3.url}{prefix}{slash}"}
        if not slash:
            fsspec.filesystem("s3", **options).mkdir(bucket)
        for name in NAMES:
            folder = Location(f"{bucket}/{name}", **options)
            folder.write(name, name.encode())
            assert folder.names() == list(folder.files()) == [name]
            parent, last = folder.split()
            assert parent.below(last).read(name) == folder.read(name, 0, 99) == name.encode()
            assert (last, folder.exists(name), folder.size(name)) == (name, True, len(name.encode()))
        assert set(Location(bucket, **options).files()) == {f"{name}/{name}" for name in NAMES}


@pytest.mark.parametrize("name", ["a+b", "a%20b", "a b", "a%23b", "ünï", "a&b;c"])
def test_web_addresses_are_taken_literally(tmp_path: Path, web: Any, name: str) -> None:
    from urllib.parse import unquote

    (tmp_path / "web" / unquote(name)).write_bytes(DATA)
    for place, relative in ((f"{web.url}/{name}?a=%2F%2B", ""), (f"{web.url}?a=%2F%2B", name)):
        assert Location(place).read(relative, 1, 3) == DATA[1:3]
        assert web.requests[-1][1].endswith("?a=%2F%2B")


def _public_bucket_rule(public: str) -> Callable[[dict[str, Any]], int | None]:
    """A rule that accepts only unsigned requests for one bucket, and only signed ones for the others."""

    def rule(environ: dict[str, Any]) -> int | None:
        is_signed = "HTTP_AUTHORIZATION" in environ
        if environ["PATH_INFO"].startswith(f"/{public}"):
            return 403 if is_signed else None  # as AWS refuses keys that it does not know
        return None if is_signed else 403

    return rule


def test_anonymous_and_signed_access_work_in_one_process(
    bucket: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = f"public-{uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(public)
    fsspec.filesystem("s3").pipe_file(f"{public}/photos/x", DATA, ACL="public-read")
    s3.rule = _public_bucket_rule(public)
    with refused(UserError, None, f"s3://{public}/photos/x", 403, "DATAMERGE_STORAGE", "FSSPEC_S3_ANON"):
        Location(f"s3://{public}/photos").read("x")
    file = tmp_path / "storage.toml"
    file.write_text(f'["s3://{public}"]\nanon = true\n["s3://{public}-not"]\nanon = false\n')
    monkeypatch.setenv("DATAMERGE_STORAGE", str(file))
    place = Location(f"s3://{public}/photos")
    monkeypatch.delenv("DATAMERGE_STORAGE")  # workers on other machines do not have it
    copy = pickle.loads(pickle.dumps(place))
    assert copy.split()[0].below("photos").read("x") == DATA
    Location(bucket).write("y", DATA)
    assert Location(bucket).read("y") == DATA


@pytest.mark.parametrize("way", ["file", "variable"])
def test_requester_pays_is_an_option(
    bucket: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    Location(bucket).write("x", DATA)
    s3.rule = lambda environ: None if environ.get("HTTP_X_AMZ_REQUEST_PAYER") == "requester" else 403
    with refused(UserError, None, f"{bucket}/x", 403, "REQUESTER_PAYS"):
        Location(bucket).read("x")
    if way == "file":
        (tmp_path / "storage.toml").write_text(f'["{bucket}"]\nrequester_pays = true\n')
        monkeypatch.setenv("DATAMERGE_STORAGE", str(tmp_path / "storage.toml"))
    else:
        monkeypatch.setitem(fsspec.config.conf, "s3", {"requester_pays": "true"})
    place = Location(bucket)
    with place.open("x") as stream:
        assert stream.read() == DATA
    assert (place.read("x"), place.size("x"), place.names()) == (DATA, len(DATA), ["x"])


@pytest.mark.parametrize(
    ("value", "meant"), [("false", False), ("False", False), ("0", False), ("no", False), ("True", True), (1, True)]
)
def test_boolean_variables_are_parsed(s3: S3Server, value: Any, meant: bool) -> None:
    before = dict(fsspec.config.conf)
    try:
        fsspec.config.set_conf_env(fsspec.config.conf, {"FSSPEC_S3_ANON": str(value), "FSSPEC_S3_KEY": "true"})
        location = Location("s3://any")
        assert location.fs.anon is meant
        assert fsspec.config.conf["s3"]["anon"] is meant
    finally:
        fsspec.config.conf.clear()
        fsspec.config.conf.update(before)


def test_a_variable_that_is_no_boolean_is_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": "maybe"})
    with refused(ConfigError, None, "FSSPEC_S3_ANON", "'maybe'"):
        Location("s3://any")


@pytest.mark.parametrize(
    ("text", "fact"),
    [(None, "No such file"), ("[", "TOML"), ("anon = true", "'anon'"), ('["public"]\nanon = true', "'public'")],
)
def test_broken_files_of_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, fact: str
) -> None:
    file = tmp_path / "storage.toml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("DATAMERGE_STORAGE", str(file))
    with refused(ConfigError, None, "DATAMERGE_STORAGE", str(file), fact):
        Location("s3://any")
    Location(str(tmp_path))  # local paths need no options


@pytest.mark.parametrize(
    ("status", "signed", "fact"),
    [
        (403, False, "credentials"),
        (403, True, "new one"),
        (401, True, "new one"),
        (400, False, "check the URL"),
        (405, False, "check the URL"),
    ],
)
def test_refusals_say_what_to_do_and_are_not_retried(
    web: Any, quick: list[float], status: int, signed: bool, fact: str
) -> None:
    web.fault = lambda method, path: status
    with refused(UserError, None, f"{web.url}/x: ", status, fact) as caught:
        Location(web.url + ("?sig=SECRET" if signed else "")).read("x")
    assert "SECRET" not in str(caught.value)
    assert len(web.requests) == 1
    assert quick == []
