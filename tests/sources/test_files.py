"""Files as columns against lists of tuples, and the walk that lists a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamerge.sources.files import File, Files
from datamerge.sources.listing import Listing, _walk, list_folder
from datamerge.sources.sample import plain_keys
from storage_schemas import Location, SourceError
from tests.support.refusals import refused
from tests.support.small_sources import photo, put

# Their order depends on dots and hyphens, which sort before slashes, and on UTF-8.
PARTS = st.text("ab.-é😀\uffff", min_size=1, max_size=3).filter(lambda part: part[0] != "." and part[-1] != ".")
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=3).map("/".join), max_size=12, unique=True)


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def same(files: Files, expected: Sequence[File]) -> bool:
    folders = [files.folders[place] for place in files.of_folder.tolist()]
    assert folders == [folder_of(name) for name, _ in expected]
    assert sorted(files.folders) == sorted(set(folders))
    assert list(files.paths()) == [name for name, _ in expected]
    return list(files) == [files[place] for place in range(len(files))] == list(expected)


@settings(deadline=None, max_examples=50)
@given(PATHS, st.data())
def test_columns_equal_the_sorted_list(names: list[str], data: st.DataObject) -> None:
    listed = [(f"top/{name}", size) for size, name in enumerate(names)]
    files, expected = Files.of(listed), sorted(listed)
    assert same(files, expected)
    assert files[1:5:2] == expected[1:5:2]
    kept = data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    some = files.where(np.array(kept, np.bool_))
    assert same(some, [file for file, keep in zip(expected, kept, strict=True) if keep])
    chosen = data.draw(st.sets(st.sampled_from(files.folders))) if names else set()
    some = files.in_folders([folder in chosen for folder in files.folders])
    assert same(some, [file for file in expected if folder_of(file[0]) in chosen])
    assert same(files.below("top"), [(name[4:], size) for name, size in expected])


@settings(deadline=None, max_examples=20)
@given(PATHS)
def test_the_walk_is_sorted(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Sorting afterwards would take memory for two lists."""
    root = tmp_path_factory.mktemp("walk")
    for name in names:
        path = root / f"{name}.png"
        if not any(above.is_file() for above in path.parents) and not path.exists():
            put(root, f"{name}.png", data=b"x")
    location = Location(root)
    found = [name for name, _, _ in _walk(Listing(location))]
    below = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    assert found == below == [name for name, _ in list_folder(location).of("image")]


def test_text_files_named_as_an_image_are_only_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "a.txt", "a.json", "b/labels.csv", "b/state.json", "b/x.zip", "b/notes")
    (tmp_path / "b/notes").write_bytes(b"text")
    listing = list_folder(Location(tmp_path))
    assert sorted(listing.others) == ["b/labels.csv", "b/state.json", "b/x.zip"]
    assert listing.left_out == {".txt": 1, ".json": 2, ".csv": 1, ".zip": 1, "without a suffix": 1}


def test_an_image_without_a_suffix_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    """A file of such a name that is not an image is left out."""
    put(tmp_path, "a.png")
    path = tmp_path / os.fsdecode(b"\xff")
    path.write_bytes(b"text")
    assert list_folder(Location(tmp_path)).left_out == {"without a suffix": 1}
    path.write_bytes(photo())
    with refused(SourceError, None, tmp_path, "UTF-8", r"'\udcff'"):
        list_folder(Location(tmp_path))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.text("aB9_-./ é\n\0\udcff\xfe\xff", max_size=8), max_size=5))
def test_keys_of_many_names_at_once(names: list[str]) -> None:
    suffix, others = re.compile(r"\.[A-Za-z0-9]+$"), re.compile(r"[^A-Za-z0-9_\-]+")
    assert plain_keys(names) == [others.sub("_", suffix.sub("", name)) or "_" for name in names]
