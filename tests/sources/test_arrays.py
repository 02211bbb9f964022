"""IDX files as MNIST's authors wrote them, .npz archives, and data sets from Python."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamerge.sources import BadImage, Source, decode, native_shape, open_source
from storage_schemas import SourceError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused

RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 256, (6, 5, 4)).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (6, 5, 4, 3)).astype(np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9])


def _idx(array: npt.NDArray[Any]) -> bytes:
    """By the description at yann.lecun.com: magic 0 0 type rank, sizes, data; all big-endian."""
    header = struct.pack(f">4B{array.ndim}i", 0, 0, 0x08, array.ndim, *array.shape)
    return header + array.astype(">u1").tobytes()


def _check(source: Source, images: npt.NDArray[np.uint8], labels: list[int] | None) -> None:
    assert [s.label for s in source.samples] == (labels if labels is not None else [None for _ in images])
    assert len({sample.key for sample in source.samples}) == len(images)
    reader = pickle.loads(pickle.dumps(source.reader))
    for sample, image in zip(source.samples, images, strict=True):
        raw = reader.read(sample)
        expected = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        assert native_shape(raw) == expected.shape
        np.testing.assert_array_equal(decode(raw, Preprocessing(shape=expected.shape)), expected)


@pytest.mark.parametrize("images_gz", [False, True])
@pytest.mark.parametrize("labels_gz", [False, True, None])
def test_idx(tmp_path: Path, images_gz: bool, labels_gz: bool | None) -> None:
    name = "train-images-idx3-ubyte" + (".gz" if images_gz else "")
    (tmp_path / name).write_bytes(gzip.compress(_idx(GREY)) if images_gz else _idx(GREY))
    if labels_gz is not None:
        data = _idx(LABELS)
        path = tmp_path / ("train-labels-idx1-ubyte" + (".gz" if labels_gz else ""))
        path.write_bytes(gzip.compress(data) if labels_gz else data)
    source = open_source(tmp_path / name)
    _check(source, GREY, None if labels_gz is None else LABELS.tolist())
    assert source.samples[2].key == "train-images-idx3-ubyte-00000002"


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (b"", (" IDX ", 0)),
        (b"text text text", (" IDX ", 14)),
        (_idx(GREY)[:-1], (" IDX ", len(_idx(GREY)) - 1)),
        (gzip.compress(_idx(GREY))[:-20], ("gzip:",)),
    ],
    ids=["nothing", "text", "cut short", "gzip cut short"],
)
def test_broken_idx(tmp_path: Path, data: bytes, facts: tuple[object, ...]) -> None:
    (tmp_path / "x-idx3-ubyte").write_bytes(data)
    with refused(SourceError, None, tmp_path / "x-idx3-ubyte", *facts):
        open_source(tmp_path / "x-idx3-ubyte")


@pytest.mark.parametrize("images", [GREY, COLOUR, COLOUR[..., :1]], ids=["grey", "colour", "one channel"])
def test_npz(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    np.savez(tmp_path / "x.npz", images=images, labels=LABELS, site=np.array(list("abcabc")))
    plain = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    _check(open_source(tmp_path / "x.npz"), plain, LABELS.tolist())
    grouped = open_source(tmp_path / "x.npz", group_column="site", label_column="labels")
    assert [sample.group for sample in grouped.samples] == list("abcabc")


def test_npz_with_channels_first_and_other_names(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", pictures=COLOUR.transpose(0, 3, 1, 2), classes=LABELS[:, None])
    _check(open_source(tmp_path / "x.npz", label_column="classes"), COLOUR, LABELS.tolist())


@pytest.mark.parametrize(
    ("arrays", "options", "facts"),
    [
        ({"images": GREY.astype(float)}, {}, ("float64 [6, 5, 4]", "np.uint8")),
        ({"a": GREY, "b": GREY}, {}, ("'a'", "'b'", "`image_column`")),
        ({"images": COLOUR[..., :2]}, {}, ("images", [6, 5, 4, 2])),
        ({"images": GREY, "labels": LABELS[:3]}, {}, ("'labels'", 6, [3])),
        ({"images": GREY}, {"label_column": "y"}, ("'y'", 6, ["images"])),
        ({"images": GREY, "labels": LABELS + 0.5}, {}, ("'labels'", "number 3.5")),
        ({"images": np.array([{}], object)}, {}, (" .npz ", "allow_pickle")),
    ],
)
def test_arrays_that_do_not_match_are_refused(
    tmp_path: Path, arrays: dict[str, Any], options: dict[str, str], facts: tuple[object, ...]
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with refused(SourceError, None, tmp_path / "x.npz", *facts):
        open_source(tmp_path / "x.npz", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [GREY, COLOUR, COLOUR.transpose(0, 3, 1, 2)], ids=["grey", "HWC", "CHW"])
def test_npy(tmp_path: Path, images: npt.NDArray[np.uint8]) -> None:
    np.save(tmp_path / "x.npy", images)
    for where in (tmp_path, tmp_path / "x.npy"):
        _check(open_source(where), COLOUR if images.ndim == 4 else GREY, None)
    assert open_source(tmp_path / "x.npy").samples[2].key == "x-00000002"


def test_images_of_zeros_and_ones_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In 8 bits, 1 is almost black; such images were probably meant to be scaled."""
    for name, images in (("ones", GREY % 2), ("more", GREY % 3), ("none", GREY * 0)):
        np.save(tmp_path / f"{name}.npy", images)
        _check(open_source(tmp_path / f"{name}.npy"), images, None)
        lines = [line for line in capsys.readouterr().err.splitlines() if "255 * x" in line]
        assert len(lines) == (name == "ones")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("images", "facts"),
    [
        (np.zeros((10, 3072), np.uint8), ("flat rows", "reshape(-1, 3, 32, 32)")),
        (np.zeros((10, 784), np.uint8), ("flat rows", "reshape(-1, 28, 28)")),
        (np.zeros((2, 5, 4, 3), np.float32) + 0.5, ("float32", "0.5", "np.round(255 * x)")),
        (np.zeros((2, 5, 4, 3), np.float32) + 200, ("float32", "200.0", "x.astype(np.uint8)")),
        (np.zeros((2, 5, 4, 3), np.float64) - 1, ("float64", "-1.0", "from 0 to 255")),
        (np.zeros((2, 5, 4), np.int64) + 255, ("int64", "255", "astype(np.uint8)")),
        (np.zeros((2, 5, 4), np.uint16) + 999, ("uint16", "999", "from 0 to 255")),
        (np.zeros((2, 5, 4), np.uint16) + 200, ("uint16", "200", "x.astype(np.uint8)")),
        (np.zeros((2, 5, 4), np.float32) + np.nan, ("float32", "nan", "from 0 to 255")),
        (np.zeros((2, 5, 4), bool), ("bool", "(255 * x).astype(np.uint8)")),
        (np.ones((2, 5, 4), np.int64), ("int64", "(255 * x).astype(np.uint8)")),
        (np.zeros((2, 3, 5, 3), np.uint8), ([2, 3, 5, 3], "two")),
        (np.zeros((2, 5, 4, 4), np.uint8), ([2, 5, 4, 4], "alpha")),
        (np.zeros((5, 4, 3), np.uint8), ([5, 4, 3], "one image", "[1, H, W, C]")),
        (np.zeros((0, 5, 4, 3), np.uint8), ([0, 5, 4, 3],)),
        (np.zeros((0, 5, 4), np.uint8), ([0, 5, 4],)),
        (np.zeros(5, np.uint8), ("uint8 [5]",)),
        (np.array(["a", "b"]), ("<U1 [2]",)),
        (np.array(3, np.uint8), ("uint8 []",)),
    ],
)
def test_arrays_that_are_not_8_bit_images_are_refused_with_advice(
    tmp_path: Path, images: npt.NDArray[Any], facts: tuple[object, ...], suffix: str
) -> None:
    path = tmp_path / f"x{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, images)
    with refused(SourceError, None, path, *facts):
        open_source(path)


def test_an_archive_without_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    for where in (tmp_path, tmp_path / "x.npz"):
        with refused(SourceError, None, tmp_path / "x.npz", "no array"):
            open_source(where)


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"text"])
def test_broken_npy(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with refused(SourceError, None, tmp_path / "x.npy"):
        open_source(tmp_path / "x.npy")


def test_three_grey_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An array [3, H, W] may be meant as one image, channels first."""
    np.save(tmp_path / "x.npy", GREY[:3])
    assert len(open_source(tmp_path).samples) == 3
    assert "3 grey images" in capsys.readouterr().err


def test_a_folder_of_several_idx_files_is_refused(tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(_idx(GREY))
        (tmp_path / name.replace("images-idx3", "labels-idx1")).write_bytes(_idx(LABELS))
    with refused(SourceError, None, tmp_path, "found 2 ", "t10k-images-idx3-ubyte", "train-images-idx3-ubyte"):
        open_source(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    _check(open_source(tmp_path), GREY, LABELS.tolist())


class Digits:
    """Like torchvision's data sets, with targets and classes that need no image to be opened."""

    classes = ("zero", "one")
    targets = (0, 1, 1, 0, 1, 0)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(GREY[index]), self.targets[index]


class Plain:
    """A data set of arrays and labels, without further attributes."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return COLOUR[index], int(LABELS[index])


class Floats(Plain):
    def __getitem__(self, index: int) -> tuple[Any, int]:
        return COLOUR[index] / 255, 0


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this file importable under the name that the `python:` sources use."""
    import sys

    monkeypatch.setitem(sys.modules, "my_data", sys.modules[__name__])


def test_factories_make_data_sets() -> None:
    source = open_source("python:my_data:Digits")
    _check(source, GREY, list(Digits.targets))
    assert source.class_names == ["zero", "one"]
    _check(open_source("python:my_data:Plain"), COLOUR, LABELS.tolist())
    _check(open_source("python:my_data:Plain", limit_first=2), COLOUR[:2], LABELS.tolist()[:2])


def test_float_images_of_a_data_set_are_rejected_sample_by_sample() -> None:
    source = open_source("python:my_data:Floats")
    with pytest.raises(BadImage, match=r"float64 \[5, 4, 3\].*ToTensor"):
        source.reader.read(source.samples[0])


@pytest.mark.parametrize(
    ("url", "facts"),
    [
        ("python:my_data:Nothing", (" Nothing ", __file__)),
        ("python:no_such_module:x", (" no_such_module", Path.cwd())),
        ("python:my_data", ("python:MODULE:FACTORY",)),
        ("python:my_data:int", (" int ", "len()")),
    ],
)
def test_factories_that_make_no_data_set(
    url: str, facts: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "int", int)
    with refused(SourceError, None, url, *facts):
        open_source(url)


def test_labels_and_groups_are_read_from_labels_csv(tmp_path: Path) -> None:
    """The NIPS 2017 data set has images/ beside labels.csv."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        buffer = io.BytesIO()
        Image.fromarray(GREY[0]).save(buffer, "PNG")
        (tmp_path / "images" / f"{name}.png").write_bytes(buffer.getvalue())
    (tmp_path / "labels.csv").write_text("file,label,author\na.png,7,x\nimages/c.png,2,y\n")
    source = open_source(tmp_path, group_column="author")
    assert [(s.name, s.label, s.group) for s in source.samples] == [
        ("images/a.png", 7, "x"),
        ("images/b.png", None, None),
        ("images/c.png", 2, "y"),
    ]
    assert [s.label for s in open_source(tmp_path, label_column="author").samples] == [0, None, 1]
    with refused(SourceError, None, tmp_path / "labels.csv", "'site'", ["file", "label", "author"]):
        open_source(tmp_path, group_column="site")
    (tmp_path / "labels.csv").write_text("file,label\nmissing.png,1\n")
    with refused(SourceError, None, tmp_path / "labels.csv", "'missing.png'"):
        open_source(tmp_path)
    (tmp_path / "labels.csv").write_text("author,label\nx,1\n")
    with refused(SourceError, None, tmp_path / "labels.csv", "'file'", ["author", "label"]):
        open_source(tmp_path)


def test_labels_from_an_unnamed_array_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", np.zeros((2, 4, 4), np.uint8), np.array([5, 7]))
    assert [sample.label for sample in open_source(tmp_path / "x.npz").samples] == [5, 7]
    assert "labels are taken from 'arr_1'" in capsys.readouterr().err


@pytest.mark.parametrize("array", ["class_names", "classes"])
@pytest.mark.parametrize(
    ("labels", "given", "expected", "indices"),
    [
        ([2, 0, 1, 1], ["dog", "cat", "eel"], ["dog", "cat", "eel"], [2, 0, 1, 1]),
        ([2, 0, 1, 1], [b"dog", b"cat", b"eel", b"ant"], ["dog", "cat", "eel", "ant"], [2, 0, 1, 1]),
        (["eel", "dog", "cat", "cat"], ["dog", "cat", "eel"], ["dog", "cat", "eel"], [2, 0, 1, 1]),
        ([2, 0, 1, 1], ["dog", "cat"], [], [2, 0, 1, 1]),
        ([2, 0, 1, 1], ["eel", "dog", "cat", "cat"], [], [2, 0, 1, 1]),
        ([2, 0, 1, 1], [["dog"], ["cat"], ["eel"]], [], [2, 0, 1, 1]),
        (["eel", "dog", "cat", "cat"], ["dog", "cat"], ["cat", "dog", "eel"], [2, 1, 0, 0]),
    ],
    ids=["as many", "bytes, one more", "labels by name", "too few", "one an image", "two axes", "other names"],
)
def test_class_names_are_read_from_an_array(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    array: str,
    labels: list[Any],
    given: list[Any],
    expected: list[str],
    indices: list[int],
) -> None:
    arrays: dict[str, Any] = {"images": COLOUR[:4], "labels": np.array(labels), array: np.array(given)}
    np.savez(tmp_path / "x.npz", **arrays)
    source = open_source(tmp_path / "x.npz")
    assert ([sample.label for sample in source.samples], list(source.class_names)) == (indices, expected)
    (line,) = capsys.readouterr().err.splitlines()
    taken = f"the names of {len(given)} classes are taken from {array!r}"
    assert (taken in line) == (len(expected) == len(given)), line
    if taken not in line:
        assert "left out" in line
