"""Which files of a folder are read, or left out and reported: links, suffixes, hidden and empty files, mixed data."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from datamerge.sources import open_source
from datamerge.sources.images import FORMATS
from datamerge.sources.suffixes import EXTENSIONS, HEIF
from storage_schemas import Location, SourceError
from tests.support.paths import GOLDEN
from tests.support.refusals import refused
from tests.support.small_sources import photo, put, table, tar

ARTIFACT = GOLDEN / "v1" / "webdataset-uint8_moments-full"


def names(where: Path | str) -> list[str]:
    return [sample.name for sample in open_source(where).samples]


def test_every_suffix_of_the_decoders_formats_is_read() -> None:
    """The oracle is Pillow's list of suffixes of the formats that are decoded."""
    registered = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    assert registered - {*HEIF} <= {*EXTENSIONS}


@pytest.mark.parametrize("suffix", EXTENSIONS)
def test_suffixes_are_read_in_any_case(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, f"a{suffix}", f"b{suffix.upper()}")
    assert names(tmp_path) == [f"a{suffix}", f"b{suffix.upper()}"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "PPM", "AVIF"])
def test_images_without_a_suffix_are_recognised_by_their_first_bytes(tmp_path: Path, form: str) -> None:
    put(tmp_path, "0a1b", "c/photo.2021", data=photo(form))
    put(tmp_path, "LICENSE", data=b"text")
    source = open_source(tmp_path)
    assert [sample.name for sample in source.samples] == ["0a1b", "c/photo.2021"]
    assert source.left_out == {"without a suffix": 1}


def test_many_files_without_a_suffix_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datamerge.sources.listing.ALL_SNIFFED", 3)
    put(tmp_path, *"abcdef")
    assert names(tmp_path) == [*"abcdef"]


def test_many_objects_without_a_suffix_are_all_taken_or_all_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the first bytes of each would cost a request a file."""
    monkeypatch.setattr("datamerge.sources.listing.ALL_SNIFFED", 3)
    files = fsspec.filesystem("memory")
    try:
        for name in "abcdefgh":
            files.pipe(f"/sniff-test/x/{name}", photo())
        files.pipe("/sniff-test/x/c.png", photo())
        assert len(names("memory://sniff-test")) == 9
        files.pipe("/sniff-test/x/a", b"text")
        source = open_source("memory://sniff-test")
        assert (len(source.samples), source.left_out) == (1, {"without a suffix": 8})
    finally:
        files.rm("/sniff-test", recursive=True)


def test_empty_objects_that_mark_folders_are_ignored(bucket: str) -> None:
    Location(bucket).write("p/cat/a.png", photo())
    fsspec.filesystem("s3").pipe(f"{bucket}/p/dog/", b"")
    assert (names(f"{bucket}/p"), dict(open_source(f"{bucket}/p").left_out)) == (["cat/a.png"], {})


def test_files_left_out_are_counted_and_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "cat/a.jpg", "cat/._a.jpg", "cat/Thumbs.db", "__MACOSX/cat/a.jpg", ".git/x.png", "dog/b.png")
    put(tmp_path, "cat/a.txt", "cat/b.TXT", "notes.md", data=b"text")
    put(tmp_path, "dog/empty.png", data=b"")
    (tmp_path / "dog/dead.png").symlink_to("nowhere")
    source = open_source(tmp_path)
    assert [sample.name for sample in source.samples] == ["cat/a.jpg", "dog/b.png"]
    assert source.left_out == {".txt": 2, ".md": 1, "hidden": 4, "empty": 1, "links that lead nowhere": 1}
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert lines == [
        f"{tmp_path}: 9 files left out: 4 hidden, 2 .txt, 1 .md, 1 empty, 1 links that lead nowhere",
    ]


def test_links_to_folders_are_followed_and_cycles_left_out(tmp_path: Path) -> None:
    put(tmp_path, "real/dog/x.png", "photos/cat/y.png")
    (tmp_path / "photos/dog").symlink_to(tmp_path / "real/dog")
    (tmp_path / "photos/puppy").symlink_to("../real/dog")
    (tmp_path / "photos/cat/up").symlink_to("..")
    (tmp_path / "photos/all").symlink_to(tmp_path)
    (tmp_path / "real/dog/around").symlink_to(tmp_path / "real")
    (tmp_path / "photos/self").symlink_to("self")
    source = open_source(tmp_path / "photos")
    assert [sample.name for sample in source.samples] == ["cat/y.png", "dog/x.png", "puppy/x.png"]
    assert source.class_names == ["cat", "dog", "puppy"]
    assert source.left_out["links back to a folder above"] == 4
    assert source.left_out["links that lead nowhere"] == 1


def test_an_unreadable_folder_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read every folder, so the system's refusal is simulated."""
    put(tmp_path, "a/x.png", "b/x.png")
    for name in ("scandir", "listdir"):  # pathlib uses either, depending on the version of Python
        real = getattr(os, name)

        def refusing(path: str, real: Callable[[str], object] = real) -> object:
            if str(path).endswith("/b"):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        monkeypatch.setattr(os, name, refusing)
    assert open_source(tmp_path).left_out == {"folders that may not be read": 1}


PATTERN_LIKE = ["a[1].tar", "a{1,2}.tar", "a*.tar", "a?.tar", "100% #1 a b.tar", "[x]/a[1].tar", "{y}/b.tar"]


@pytest.mark.parametrize("name", PATTERN_LIKE)
def test_names_that_look_like_patterns_are_taken_literally(tmp_path: Path, name: str) -> None:
    tar(tmp_path / name)
    tar((tmp_path / name).with_name("a1.tar"), "wrong.png")
    assert names(tmp_path / name)[0].endswith(" a")
    for folder in ("p[1]", "p{1,2}", "p*", "p%20#"):
        put(tmp_path, f"{folder}/x.png")
        assert names(tmp_path / folder) == ["x.png"]
        tar(tmp_path / folder / "t" / "0.tar")
        assert len(names(f"{tmp_path / folder}/t/*.tar")) == 1
        assert len(names(f"{tmp_path / folder}/t/{{0..0}}.tar")) == 1


@pytest.mark.parametrize("name", ["a[1].tar", "a{1,2}.tar", "a*.tar", "a%20+b #1.tar"])
def test_names_that_look_like_patterns_are_taken_literally_on_an_object_store(
    bucket: str, tmp_path: Path, name: str
) -> None:
    tar(tmp_path / "x.tar")
    Location(bucket).write(f"d[1]/{name}", (tmp_path / "x.tar").read_bytes())
    for url in (f"{bucket}/d[1]/{name}", f"{bucket}/d[1]", f"{bucket}/d[1]/*.tar"):
        source = open_source(url)
        assert source.reader.read(source.samples[0]) == photo()


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_patterns_match_files_of_one_kind(tmp_path: Path, suffix: str) -> None:
    for number in range(3):
        (tar if suffix == ".tar" else table)(tmp_path / f"s-{number}{suffix}")
    for pattern in ("s-*", "s-{0..2}", "s-[0-2]", "s-?"):
        assert len(names(f"{tmp_path}/{pattern}{suffix}")) == 3
    assert len(names(f"{tmp_path}/s-*")) == 3
    (table if suffix == ".tar" else tar)(tmp_path / ("s-x.parquet" if suffix == ".tar" else "s-x.tar"))
    with refused(SourceError, None, "Parquet files", "tars"):
        open_source(f"{tmp_path}/s-*")


@pytest.mark.parametrize("name", ["X.PARQUET", "X.TAR", "X.NPZ", "X.NPY"])
def test_suffixes_of_tables_tars_and_arrays_are_read_in_upper_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    with io.BytesIO() as stream:
        if path.suffix == ".NPZ":
            np.savez(stream, images=pixels)
        elif path.suffix == ".NPY":
            np.save(stream, pixels)
        path.write_bytes(stream.getvalue())
    if path.suffix == ".PARQUET":
        table(path)
    elif path.suffix == ".TAR":
        tar(path)
    for where in (path, tmp_path):
        assert len(open_source(where).samples) == (2 if name.startswith("X.NP") else 1)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR.GZ", "x.tar.zst", "x.zip", "x.7z", "x.rar", "x.tar.xz"])
def test_archives_are_refused_with_advice_to_unpack_them(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, data=b"anything")
    for where in (tmp_path, tmp_path / name):
        with refused(SourceError, None, tmp_path, "unpack"):
            open_source(where)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bz2.compress])
def test_a_compressed_tar_with_the_suffix_tar_is_refused(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    tar(tmp_path / "x.tar")
    put(tmp_path, "x.tar", data=compress((tmp_path / "x.tar").read_bytes()))
    with refused(SourceError, None, tmp_path / "x.tar", "byte ranges"):
        open_source(tmp_path)


def test_heic_files_without_the_heif_package_are_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datamerge.sources.suffixes.reads_heif", lambda: False)
    put(tmp_path, "a.heic", "b.HEIC", data=b"\0\0\0\x18ftypheic")
    with refused(SourceError, None, tmp_path, "2 .heic", "pip install 'datamerge[heif]'"):
        open_source(tmp_path)
    put(tmp_path, "c.png")
    assert list(open_source(tmp_path).left_out.values()) == [2]


MIXED: dict[str, Callable[[Path], object]] = {
    "tar": lambda folder: tar(folder / "old/photos.tar"),
    "Parquet file": lambda folder: table(folder / "x.parquet"),
    "array file": lambda folder: np.savez(folder / "x.npz", images=np.zeros((2, 4, 4), np.uint8)),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("images", [1, 12])
def test_mixed_folders_are_refused_with_counts(tmp_path: Path, kind: str, images: int) -> None:
    put(tmp_path, *(f"{number % 2}/{number}.png" for number in range(images)))
    MIXED[kind](tmp_path)
    with refused(SourceError, None, tmp_path, f"{images} image", f"1 {kind}", "move them apart"):
        open_source(tmp_path)


def test_tables_and_arrays_without_images_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "cat/a.png", "dog/b.png")
    table(tmp_path / "metadata.parquet", file_name=["a.png"], caption=["a photo"])
    np.save(tmp_path / "embeddings.npy", np.zeros((2, 8), np.float32))
    source = open_source(tmp_path)
    assert len(source.samples) == 2
    assert source.left_out == {".parquet without images": 1, ".npy without images": 1}


def test_a_single_image_file_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    with refused(SourceError, None, tmp_path / "a.png", "folder"):
        open_source(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["", "empty"])
def test_folders_without_images_are_refused_with_their_contents(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, "a.txt", "b.docx", data=b"text")
    facts = ["an empty folder"] if name else ["2 files", "1 .txt", "1 .docx"]
    with refused(SourceError, None, tmp_path / name, *facts):
        open_source(tmp_path / name)


def _copy_artifact(target: Path) -> None:
    for path in ARTIFACT.rglob("*"):
        if path.is_file():
            put(target, str(path.relative_to(ARTIFACT)), data=path.read_bytes())


def test_an_artifact_is_neither_a_source_nor_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "cat/a.png", "dog/b.png")
    before = open_source(tmp_path)
    _copy_artifact(tmp_path / "adv")
    after = open_source(tmp_path)
    assert (after.samples, after.class_names, after.fingerprint) == (
        before.samples,
        before.class_names,
        before.fingerprint,
    )
    assert "adv is an artifact" in capsys.readouterr().err
    with refused(SourceError, None, tmp_path / "adv", "artifact"):
        open_source(tmp_path / "adv")


def test_an_artifact_on_an_object_store_is_not_a_class(tmp_path: Path) -> None:
    _copy_artifact(tmp_path)
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path), "/listing-test/in/adv", recursive=True)
    files.pipe("/listing-test/cat/a.png", photo())
    files.pipe("/listing-test/.DS_Store", b"x")
    try:
        source = open_source("memory://listing-test")
        assert [sample.name for sample in source.samples] == ["cat/a.png"]
        assert source.left_out == {"hidden": 1}
        with refused(SourceError, None, "memory://listing-test/in/adv", "artifact"):
            open_source("memory://listing-test/in/adv")
    finally:
        files.rm("/listing-test", recursive=True)


def test_a_table_beside_the_images_of_a_split_must_be_called_labels_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "train/a.png", "train/b.png")
    put(tmp_path, "train/metadata.csv", data=b"file_name,label\na.png,1\nb.png,0\n")
    open_source(tmp_path)
    assert "call one that holds them labels.csv" in capsys.readouterr().err
    (tmp_path / "train" / "metadata.csv").rename(tmp_path / "train" / "labels.csv")
    assert [sample.label for sample in open_source(tmp_path).samples] == [1, 0]


@pytest.mark.parametrize("name", ["metadata.csv", "train.csv", "Labels.csv", "metadata.jsonl", "meta/list_attr.tsv"])
def test_tables_that_are_not_read_are_reported(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a.png", "b.png")
    put(tmp_path, name, data=b"file_name,label\na.png,1\nb.png,0\n")
    source = open_source(tmp_path)
    assert {sample.label for sample in source.samples} == {None}
    assert f"not taken from {name}" in capsys.readouterr().err
    put(tmp_path, "labels.csv", data=b"file_name,label\na.png,1\nb.png,0\n")
    assert [sample.label for sample in open_source(tmp_path).samples] == [1, 0]
    assert "not taken" not in capsys.readouterr().err
