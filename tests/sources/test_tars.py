"""WebDataset tars written by the stock library: same samples, read by byte ranges, from anywhere."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from PIL import Image

from datamerge.sources import BadImage, Source, decode, open_source
from datamerge.sources.sample import make_keys
from storage_schemas import Location, SourceError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused
from tests.support.small_sources import tar


def _pixels(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, (5, 4, 3), np.uint8)


def _write(path: Path, numbers: range, **extra: Any) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        for number in numbers:
            buffer = io.BytesIO()
            Image.fromarray(_pixels(number)).save(buffer, "PNG")
            sample = {"__key__": f"{number:03d}", "png": buffer.getvalue(), "cls": str(number % 3)}
            sample |= {name: function(number) for name, function in extra.items()}
            writer.write(sample)


def _check(source: Source, numbers: range) -> None:
    """Every image once, with its label, also through a reader that was sent elsewhere."""
    assert source.kind == "webdataset"
    assert [sample.label for sample in source.samples] == [number % 3 for number in numbers]
    assert len({sample.key for sample in source.samples}) == len(numbers)
    reader = pickle.loads(pickle.dumps(source.reader))
    for sample, number in [*zip(source.samples, numbers, strict=True)][::-1]:
        np.testing.assert_array_equal(
            decode(reader.read(sample), Preprocessing(shape=(3, 5, 4))), _pixels(number).transpose(2, 0, 1)
        )


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for shard in range(3):
        _write(tmp_path / f"train-{shard:02d}.tar", range(4 * shard, 4 * shard + 4))
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "train-{00..02}.tar", "train-*.tar", "{train-00,train-01,train-02}.tar"])
def test_folders_globs_and_braces(tars: Path, pattern: str) -> None:
    _check(open_source(f"{tars}/{pattern}".rstrip("/")), range(12))


def test_one_file_and_a_limit(tars: Path) -> None:
    _check(open_source(tars / "train-01.tar"), range(4, 8))
    _check(open_source(tars, limit_first=5), range(5))


def test_any_file_system(tars: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in tars.glob("*.tar"):
        files.pipe(f"/tar-test/{path.name}", path.read_bytes())
    try:
        for url in ("memory://tar-test", "memory://tar-test/train-{00..02}.tar", "memory://tar-test/train-*.tar"):
            _check(open_source(url), range(12))
    finally:
        files.rm("/tar-test", recursive=True)


def test_a_range_is_all_that_is_read(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(tars)
    read: list[tuple[str, int, int]] = []
    original = Location.read

    def counted(self: Any, name: str, start: int, end: int) -> bytes:
        read.append((name, start, end))
        return bytes(original(self, name, start, end))

    monkeypatch.setattr(Location, "read", counted)
    data = source.reader.read(source.samples[6])
    assert [(name, end - start) for name, start, end in read] == [("train-01.tar", len(data))]  # type: ignore[arg-type]


def test_labels_and_groups_from_json_and_members(tmp_path: Path) -> None:
    def facts(number: int) -> bytes:
        return json.dumps({"label": number % 2, "camera": f"c{number % 2}"}).encode()

    _write(tmp_path / "x.tar", range(4), json=facts, site=lambda number: f"s{number // 2}")
    source = open_source(tmp_path, label_column="label", group_column="site")
    assert [(s.label, s.group) for s in source.samples] == [(0, "s0"), (1, "s0"), (0, "s1"), (1, "s1")]
    assert [s.group for s in open_source(tmp_path, group_column="camera").samples] == ["c0", "c1", "c0", "c1"]
    with refused(SourceError, None, "x.tar#000", "'colour'"):
        open_source(tmp_path, label_column="colour")


def test_text_classes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for key, name in (("a", "dog"), ("b", "cat"), ("c", "dog")):
            writer.write({"__key__": key, "jpg": b"x", "cls": name})
    source = open_source(tmp_path)
    assert source.class_names == ["cat", "dog"]
    assert [sample.label for sample in source.samples] == [1, 0, 1]
    assert [sample.key for sample in source.samples] == ["x-a", "x-b", "x-c"]


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("none-{0..1}.tar", ["none-0.tar"]),
        ("no-*.tar", ["no-*.tar"]),
        ("bad.tar", ["bad.tar", " tar: ", "header"]),
    ],
)
def test_what_is_no_tar(tmp_path: Path, name: str, facts: list[str]) -> None:
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    with refused(SourceError, None, tmp_path, *facts):
        open_source(f"{tmp_path}/{name}")


def test_a_tar_without_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with refused(SourceError, None, "tars", ".jpg .jpeg .png .webp"):
        open_source(tmp_path)


@pytest.mark.parametrize("member", ["jpg.cls", "cls.txt", "index"])
def test_members_that_may_hold_labels_are_named(
    tmp_path: Path, member: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for key, label in (("a", b"3"), ("b", b"1")):
            writer.write({"__key__": key, "jpg": b"x", member: label})
    source = open_source(tmp_path)
    assert [sample.label for sample in source.samples] == [None, None]
    assert member in source.unlabelled
    assert source.unlabelled in capsys.readouterr().err
    named = open_source(tmp_path, label_column=member)
    assert [sample.label for sample in named.samples] == [3, 1]


def test_tars_of_images_alone_have_no_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("n01440764", "n01443537"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            writer.write({"__key__": f"{name}_1", "jpeg": b"x"})
    assert "folder for each class" in open_source(tmp_path).unlabelled
    assert "folder for each class" in capsys.readouterr().err


def test_images_of_another_kind_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for key in "ab":
            writer.write({"__key__": key, "input.jpg": b"x", "target.png": b"x", "cls": b"1"})
    with refused(SourceError, None, "target.png", "image_column", "dot"):
        open_source(tmp_path)
    source = open_source(tmp_path, image_column="input.jpg")
    assert [sample.label for sample in source.samples] == [1, 1]
    assert "2 other images of the samples are left out: 2 target.png" in capsys.readouterr().err


def test_tars_in_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("n01440764.tar"), io.BytesIO())
    with refused(SourceError, None, "1 .tar", "unpack"):
        open_source(tmp_path)


def test_a_command_is_refused_and_its_secret_not_shown(tmp_path: Path) -> None:
    """Earlier releases ran it."""
    with refused(SourceError, None, "pipe:") as caught:
        open_source(f"pipe:touch {tmp_path}/trace; curl https://me:hunter2@host/x.tar?sig=SECRET")
    assert not list(tmp_path.iterdir())
    assert "SECRET" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_tar_that_was_cut_since(tars: Path) -> None:
    """The sample is a reject with a reason, not a wrong image."""
    source = open_source(tars)
    path = tars / "train-02.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises((BadImage, OSError), match=r"train-02\.tar.* 0\b"):
        source.reader.read(source.samples[-1])


def test_the_fingerprint_follows_the_content(tars: Path) -> None:
    before = open_source(tars)
    data = bytearray((tars / "train-01.tar").read_bytes())
    data[1000] ^= 1
    (tars / "train-01.tar").write_bytes(bytes(data))
    after = open_source(tars)
    assert after.fingerprint != before.fingerprint
    assert after.changes(before.listing_bytes()) == ["train-01.tar has other content"]


STEMS = [
    "a/{}",
    "./{}",
    "/{}",
    "b.c/{}",
    "{}",
    'q"{}',
    "s {}",
    "s_{}",
    "é{}",
    "w#{}",
    "x.tar#/{}",
    "d" * 99 + "/{}",
    "t\t{}",
]


def _random_tar(chosen: random.Random) -> bytes:
    """A tar of samples with images, labels, sites and JSON, of which some lack or repeat something."""
    stems = [(chosen.choice(STEMS) if chosen.random() < 0.3 else "n014/{}").format(number) for number in range(60)]
    members = []
    for number, stem in enumerate(dict.fromkeys(stems)):
        fields = json.dumps({"camera": f"c{number % 3}", "note": "y" * chosen.choice([0, 900])})
        some = [("jpg", b"x" * chosen.choice([0, 9, 513, 6000])), ("cls", b"%d" % (number % 4))]
        some += [("site", f"s{number % 2}\n".encode()), ("json", fields.encode()), ("txt", b"left out")]
        members += [(f"{stem}.{name}", data) for name, data in some if chosen.random() < 0.95 or name == "cls"]
    members += [("noextension", b""), ("a/.hidden.jpg", b""), ("__MACOSX/n014/0.jpg", b"")]
    members.append((next(name for name, _ in members if name.endswith("cls")), b"3"))  # a second one, which counts
    if chosen.random() < 0.5:
        chosen.shuffle(members)
    written = io.BytesIO()
    format_ = chosen.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=written, mode="w", format=format_) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), chosen.choice([0, 1.5])
            tar.addfile(info, io.BytesIO(data))
    return written.getvalue()


def _one_by_one(folder: Path, listing: Any, group: str) -> tuple[list[Any], list[str], str]:
    """Name, label and group of each sample, the keys, and the fingerprint, from `tarfile` and dictionaries."""
    rows, texts = [], []
    for path in sorted(folder.glob("*.tar")):
        samples: dict[str, dict[str, tuple[int, bytes]]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                above, slash, base = info.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if stem and dot and not (above and info.name.startswith("__MACOSX")):
                    found = info.offset_data, tar.extractfile(info).read()  # type: ignore[union-attr]
                    samples.setdefault(f"{above}{slash if above else ''}{stem}", {})[extension] = found
        for stem, members in samples.items():
            if "jpg" in members:
                start, image = members["jpg"]
                label = int(members["cls"][1])
                value = members[group][1].decode().strip() if group in members else None
                if value is None and "json" in members:
                    value = json.loads(members["json"][1]).get(group)
                rows.append([f"{path.name}#{start}+{len(image)} {stem.rpartition('#')[2]}", label, value])
                texts.append(f"{path.name}#".replace(".tar#", "-") + stem.replace(".tar#", "-").replace("#", "-"))
    digest = hashlib.sha256(json.dumps([listing, rows]).encode()).hexdigest()
    return rows, make_keys([f"{text}.image" for text in texts]), digest


@pytest.mark.parametrize("seed", range(12))
def test_samples_of_random_tars(tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    for number in range(2):
        (tmp_path / f"part {number}.tar").write_bytes(_random_tar(chosen))
    for group in ("site", "camera"):
        source = open_source(tmp_path, group_column=group)
        rows, keys, digest = _one_by_one(tmp_path, dict(source.listing), group)
        found = [[sample.name, sample.label, sample.group] for sample in source.samples]
        assert found == rows
        assert source.samples.keys == keys
        assert source.fingerprint == digest
        assert [sample.key for sample in source.samples[::-7]] == keys[::-7]


def test_a_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    """`tarfile` takes it for the end, and half of the images would be missing."""
    tar(tmp_path / "a.tar", *(f"{number}.png" for number in range(40)))
    with tarfile.open(tmp_path / "a.tar") as archive:
        offset = archive.getmembers()[20].offset
    with (tmp_path / "a.tar").open("r+b") as stream:
        stream.seek(offset + 150)
        stream.write(b"9")
    with refused(SourceError, None, "a.tar", f"byte {offset} "):
        open_source(tmp_path / "a.tar")
