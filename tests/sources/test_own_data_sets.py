"""Custom data sets: every form of item, and every exception that an item may raise."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from datamerge.sources import BadImage, Source, factories, open_source
from merge_service import reading
from merge_service.reading import PixelReader
from storage_schemas import ConfigError, SourceError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.merging import merge_alone
from tests.support.refusals import refused

NAME = "own_data_sets"
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
PHOTO = Image.fromarray(PIXELS)
ITEMS = 256


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this file importable under `NAME`; retries of a factory do not wait."""
    monkeypatch.setitem(sys.modules, NAME, sys.modules[__name__])
    monkeypatch.setattr(factories, "WAITS", (0.0,))
    monkeypatch.setattr(reading, "WAITS", (100.0,))  # no failure here is temporary, so readers must not retry


def _open(monkeypatch: pytest.MonkeyPatch, dataset: Any, **options: Any) -> Source:
    monkeypatch.setitem(globals(), "make", lambda: dataset)
    return open_source(f"python:{NAME}:make", **options)


def _png() -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, "PNG")
    return buffer.getvalue()


def _tensor() -> torch.Tensor:
    return torch.from_numpy(PIXELS.transpose(2, 0, 1).copy())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(_png())
    return path


FORMS: dict[str, Callable[[Path], Any]] = {
    "PIL": lambda file: PHOTO,
    "lazy PIL": Image.open,
    "array": lambda file: PIXELS,
    "array, channels first": lambda file: PIXELS.transpose(2, 0, 1),
    "bytes": lambda file: _png(),
    "Path": lambda file: file,
    "text": str,
    "bytes and path": lambda file: {"bytes": _png(), "path": None},
    "path alone": lambda file: {"bytes": None, "path": str(file)},
    "tensor": lambda file: _tensor(),
    "ToTensor()": lambda file: _tensor() / 255,
}


@pytest.mark.parametrize("wrap", ["pair", "triple", "mapping"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_images_of_every_form_are_read(form: str, wrap: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = FORMS[form](file)
    item = {
        "pair": (image, 3),
        "triple": [image, 3, "more"],
        "mapping": {"id": "x", "image": image, "mask": PIXELS[..., 0], "label": 3},
    }[wrap]
    source = _open(monkeypatch, [item])
    assert source.samples[0].label == 3
    _check(source)


def _check(source: Source) -> None:
    (pixels,) = PixelReader(source.reader, Preprocessing(shape=(3, 5, 4)), 1).read(source.samples[:1])
    np.testing.assert_array_equal(pixels, PIXELS.transpose(2, 0, 1))


def test_images_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    for item in (PHOTO, (PHOTO,), {"jpg": PHOTO, "__key__": "x"}, {"photograph": PHOTO}):
        source = _open(monkeypatch, [item])
        assert source.samples[0].label is None
        _check(source)


@pytest.mark.parametrize(
    "target", [["a dog", "a cat"], [{"bbox": [1, 2, 3, 4], "category_id": 1}], {"boxes": torch.zeros(1, 4)}, []]
)
def test_captions_and_boxes_are_not_labels(target: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are ignored where no label is needed, and named in the error where one is."""
    source = _open(monkeypatch, [(PHOTO, target)] * 3)
    assert [sample.label for sample in source.samples] == [None] * 3
    if target:
        with refused(ConfigError, "label_column", "python:", source.unlabelled):
            merge_alone(Path(source.url), tmp_path / "a", grouping="label", shape="3x5x4")


def test_data_sets_of_hugging_face_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"image": [PHOTO, PHOTO], "label": [1, 0]}, features=features)
    source = _open(monkeypatch, dataset)
    assert [sample.label for sample in source.samples] == [1, 0]
    assert list(source.class_names) == ["no", "yes"]
    _check(source)
    with refused(SourceError, None, "'train'", "'test'"):
        _open(monkeypatch, datasets.DatasetDict({"train": dataset, "test": dataset}))


@pytest.mark.parametrize(
    ("value", "facts"),
    [
        (PIXELS / 255, ["ndarray float64 [5, 4, 3]", "ToTensor()"]),
        (PIXELS.astype(np.int64), ["ndarray int64"]),
        (_tensor().float(), ["Tensor torch.float32 [3, 5, 4]", " from "]),
        ((_tensor() / 255 - 0.5) / 0.5, [" from -0.", " to 0."]),
        (_tensor().float() * float("nan"), ["nan"]),
        (np.zeros((5, 4, 7), np.uint8), ["[5, 4, 7]"]),
        (np.zeros((0, 4), np.uint8), ["[0, 4]"]),
        (7, ["int"]),
        (None, ["NoneType"]),
        ({"bytes": None, "path": None}, ["null"]),
        ("/no/such/photo.png", ["FileNotFoundError", "/no/such/photo.png"]),
    ],
)
def test_values_that_are_not_images_are_described(
    value: Any, facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _open(monkeypatch, [(value, 0)])
    with pytest.raises(BadImage) as caught:
        source.reader.read(source.samples[0])
    assert [fact for fact in facts if fact not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("item", "facts"),
    [
        ({"left": PHOTO, "right": PHOTO}, ["'left'", "'right'"]),
        ({"text": "x"}, ["'text'"]),
        ((), ["empty"]),
        (3, ["int"]),
        ("photo.png", ["str"]),
    ],
)
def test_items_without_exactly_one_image_are_refused(
    item: Any, facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(SourceError, None, f"python:{NAME}:make", "item 0", *facts):
        _open(monkeypatch, [item, item])


class OddError(Exception):
    """An error whose `str` raises."""

    def __str__(self) -> str:
        raise RuntimeError


class Bad:
    """A data set whose item 200 raises."""

    targets: Any = None
    raised: BaseException | None = None

    def __init__(self, raised: BaseException | None, labelled: bool) -> None:
        self.raised = raised
        if labelled:
            self.targets = [0] * ITEMS

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 200:
            if self.raised is None:
                return Image.open(io.BytesIO(_noise()[:9000])), 0
            raise self.raised
        return PHOTO, 0


def _noise() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


RAISED = [
    (ValueError("two\nlines"), "ValueError: two"),
    (RuntimeError(), "RuntimeError"),
    (OSError("image file is truncated"), "OSError: image file is truncated"),
    (FileNotFoundError(2, "No such file", "/x.png"), "/x.png"),
    (ConnectionResetError("reset"), "ConnectionResetError: reset"),
    (TimeoutError("slow"), "TimeoutError: slow"),
    (StopIteration(), "StopIteration"),
    (MemoryError(), "MemoryError"),
    (SystemExit(3), "SystemExit: 3"),
    (GeneratorExit(), "GeneratorExit"),
    (OddError(), "OddError"),
    (None, "truncated"),
]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("raised", "reason"), RAISED, ids=lambda value: type(value).__name__)
def test_one_bad_item_rejects_only_itself(
    raised: BaseException | None, reason: str, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _open(monkeypatch, Bad(raised, labelled))
    assert len(source.samples) == ITEMS
    found = PixelReader(source.reader, Preprocessing(shape=(3, 5, 4)), 2).read(source.samples)
    bad = {index: one for index, one in enumerate(found) if isinstance(one, str)}
    assert bad.keys() == {200}
    assert reason in bad[200]
    assert "\n" not in bad[200]


def test_ctrl_c_in_an_item_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        _open(monkeypatch, Bad(KeyboardInterrupt(), labelled=False))
    source = _open(monkeypatch, Bad(KeyboardInterrupt(), labelled=True))
    with pytest.raises(KeyboardInterrupt):
        source.reader.read(source.samples[200])


class NoLength(Bad):
    def __len__(self) -> int:
        raise OSError("the index is gone")


class NoLabels(Bad):
    @property
    def targets(self) -> Any:
        raise RuntimeError("no annotations")


class Stream(IterableDataset[Any]):
    """A data set for iteration only, whose inherited indexing raises."""

    def __iter__(self) -> Iterator[Any]:
        yield PHOTO, 0

    def __len__(self) -> int:
        return 1


def test_labels_are_read_from_the_items_where_targets_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _open(monkeypatch, NoLabels(ValueError("x"), labelled=False))
    assert [sample.label for sample in source.samples].count(0) == ITEMS - 1


@pytest.mark.parametrize(
    ("dataset", "facts"),
    [
        (NoLength(None, False), ["len()", "OSError: the index is gone"]),
        (Stream(), ["Stream", "list(...)"]),
        (iter([PHOTO]), ["list_iterator", "list(...)"]),
        ({"train": [PHOTO]}, ["'train'"]),
        ([], ["empty"]),
    ],
)
def test_objects_that_are_not_map_style_data_sets_are_refused(
    dataset: Any, facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(SourceError, None, f"python:{NAME}:make", *facts):
        _open(monkeypatch, dataset)


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("def make():\n    raise KeyError('root')", ["KeyError: 'root'"]),
        ("def make():\n    raise SystemExit('no data')", ["SystemExit: no data"]),
        ("raise SystemExit('usage')", ["own_broken_data", "SystemExit: usage"]),
        ("def make(:", ["own_broken_data", "SyntaxError"]),
        ("1 / 0", ["own_broken_data", "ZeroDivisionError"]),
    ],
)
def test_failures_of_a_factory_are_reported(
    code: str, facts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken_data.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_broken_data", raising=False)
    with refused(SourceError, None, "python:own_broken_data:make", *facts):
        open_source("python:own_broken_data:make")


def test_a_broken_row_group_rejects_only_its_rows(tmp_path: Path) -> None:
    images = [{"bytes": _noise(), "path": None}] * 12
    table = pa.table({"image": images, "label": list(range(12))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=4, compression="gzip", use_dictionary=False)
    chunk = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    data[middle : middle + 64] = bytes(64)
    (tmp_path / "x.parquet").write_bytes(data)
    source = open_source(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = PixelReader(source.reader, Preprocessing(shape=(3, 8, 8)), 1).read(source.samples)
    assert [isinstance(one, str) for one in found] == [False] * 4 + [True] * 4 + [False] * 4
    assert [f"row {row} of x.parquet" in str(found[row]) for row in range(4, 8)] == [True] * 4
