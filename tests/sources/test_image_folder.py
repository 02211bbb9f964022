"""Image folders: the files that are listed, their names and keys, and the fingerprint."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamerge.sources import open_source
from datamerge.sources.sample import make_keys
from storage_schemas import SourceError
from tests.support.refusals import refused

KEY = re.compile(r"[A-Za-z0-9_\-]+")


def _make(folder: Path, names: Sequence[str], size: int = 3) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode().ljust(size, b"."))
    return folder


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    names = ["b.png", "a.JPG", "c.jpeg", "d.webp", "e.tiff", "notes.txt", "f.png.bak", "README"]
    source = open_source(_make(tmp_path, names))
    assert source.kind == "image_folder"
    assert [sample.name for sample in source.samples] == ["a.JPG", "b.png", "c.jpeg", "d.webp", "e.tiff"]
    assert [sample.key for sample in source.samples] == ["a", "b", "c", "d", "e"]
    assert {sample.label for sample in source.samples} == {None}
    assert list(source.class_names) == []


def test_backslashes_in_names_do_not_separate_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(_make(tmp_path, ["cat\\a.png", "dog\\a.png", "b.png"]))
    assert {sample.label for sample in source.samples} == {None}
    stderr = capsys.readouterr().err
    assert "2 of 3 names hold a backslash, such as cat\\a.png" in stderr


def test_first_level_folders_are_classes_when_every_image_is_in_one(tmp_path: Path) -> None:
    names = ["dog/1.png", "cat/x/deep/2.png", "cat/3.png", "ant eater/4.png"]
    source = open_source(_make(tmp_path, names))
    assert list(source.class_names) == ["ant eater", "cat", "dog"]
    found = {sample.name: sample.label for sample in source.samples}
    assert found == {"ant eater/4.png": 0, "cat/3.png": 1, "cat/x/deep/2.png": 1, "dog/1.png": 2}


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    names = ["a/1.png", "a/.2.png", ".cache/3.png", "a/.thumbs/4.png", ".5.png", "__MACOSX.png"]
    source = open_source(_make(tmp_path, names))
    assert [sample.name for sample in source.samples] == ["__MACOSX.png", "a/1.png"]


def test_a_hidden_parent_does_not_hide_its_content(tmp_path: Path) -> None:
    assert len(open_source(_make(tmp_path / ".data" / "photos", ["1.png"])).samples) == 1


def test_the_reader_gives_the_files_bytes(tmp_path: Path) -> None:
    names = ["x/ünï cødé 猫.png", "x/dotted.name.v2.png", "y/plain.png", "y/[1] #2 100%.png"]
    source = open_source(_make(tmp_path, names, size=40))
    reader = pickle.loads(pickle.dumps(source.reader))
    for sample in source.samples:
        assert reader.read(sample) == (tmp_path / sample.name).read_bytes()
        assert KEY.fullmatch(sample.key)
    (tmp_path / source.samples[0].name).unlink()
    with pytest.raises(FileNotFoundError):
        reader.read(source.samples[0])


def test_clashing_names_get_distinct_keys(tmp_path: Path) -> None:
    names = ["猫.png", "犬.png", "a/b.png", "a_b.png", "a_b.jpg", "c.png"]
    keys = {sample.name: sample.key for sample in open_source(_make(tmp_path, names)).samples}
    assert len(set(keys.values())) == len(names)
    assert keys["c.png"] == "c"
    assert keys["a_b.png"] == f"a_b-{hashlib.sha256(b'a_b.png').hexdigest()[:12]}"
    assert keys["猫.png"].startswith("_-")


NAMES = st.lists(
    st.from_regex(r"([a-z猫.]{1,3}/)?[ab_. -]{1,4}\.(png|jpg)", fullmatch=True),
    unique=True,
    min_size=1,
    max_size=12,
)


@given(NAMES, st.randoms(use_true_random=False))
def test_keys_are_unique_and_independent_of_order(names: list[str], random: object) -> None:
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    assert all(KEY.fullmatch(key) for key in keys)
    shuffled = list(names)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert dict(zip(shuffled, make_keys(shuffled), strict=True)) == dict(zip(names, keys, strict=True))


@given(NAMES, NAMES)
def test_new_files_leave_other_keys_alone(names: list[str], more: list[str]) -> None:
    """Unless they clash: a key depends on its own name and on the names it clashes with."""

    def plain(name: str) -> str:
        return make_keys([name])[0]

    taken = {plain(name) for name in more if name not in names}
    before = dict(zip(names, make_keys(names), strict=True))
    after = dict(zip([*names, *more], make_keys([*names, *more]), strict=True))
    for name in names:
        assert plain(name) in taken or before[name] == after[name] or more.count(name)


def test_limit_takes_the_first(tmp_path: Path) -> None:
    names = [f"{number:02d}.png" for number in range(20)]
    whole = open_source(_make(tmp_path, names))
    part = open_source(tmp_path, limit_first=7)
    assert list(part.samples) == list(whole.samples)[:7]
    assert part.fingerprint == whole.fingerprint
    assert len(open_source(tmp_path, limit_first=100).samples) == 20


def test_the_fingerprint_depends_on_names_and_sizes(tmp_path: Path) -> None:
    names = ["a/1.png", "b/2.png"]
    base = open_source(_make(tmp_path / "one", names)).fingerprint
    assert open_source(_make(tmp_path / "two", reversed(names))).fingerprint == base  # type: ignore[arg-type]
    (tmp_path / "one" / "notes.txt").write_text("not an image")
    assert open_source(tmp_path / "one").fingerprint == base
    (tmp_path / "two" / "a" / "1.png").write_bytes(b"longer than before")
    changed = open_source(tmp_path / "two").fingerprint
    (tmp_path / "one" / "b" / "2.png").rename(tmp_path / "one" / "b" / "3.png")
    assert len({base, changed, open_source(tmp_path / "one").fingerprint}) == 3


@pytest.mark.parametrize("kind", ["missing", "empty", "no images", "text file", "image file"])
def test_sources_without_images_are_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x"
    if kind in ("empty", "no images"):
        place.mkdir()
    if kind == "no images":
        (place / "notes.txt").write_text("text")
    if kind == "text file":
        place.write_text("text")
    if kind == "image file":
        place = tmp_path / "x.png"
        place.write_bytes(b"png")
    with refused(SourceError, None, place):
        open_source(place)


def test_a_folder_with_a_relative_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make(tmp_path, ["photos/1.png"])
    monkeypatch.chdir(tmp_path)
    for url in ("photos", "./photos/", "photos/../photos"):
        source = open_source(url)
        assert [sample.name for sample in source.samples] == ["1.png"]
        assert source.reader.read(source.samples[0]) == b"photos/1.png"


def test_folders_are_read_through_fsspec() -> None:
    files = fsspec.filesystem("memory")
    files.pipe({"/folder-test/a/1.png": b"one", "/folder-test/b/2.png": b"two", "/folder-test/.x/3.png": b"no"})
    try:
        source = open_source("memory://folder-test")
        assert [sample.name for sample in source.samples] == ["a/1.png", "b/2.png"]
        assert [source.reader.read(sample) for sample in source.samples] == [b"one", b"two"]
        assert list(source.class_names) == ["a", "b"]
    finally:
        files.rm("/folder-test", recursive=True)
