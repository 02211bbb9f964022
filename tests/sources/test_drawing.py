"""`limit` draws samples evenly over a source; `limit_first` takes the first ones."""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamerge.sources import open_source
from datamerge.sources.drawing import Limits
from storage_schemas import ConfigError
from tests.support.refusals import refused

CLASSES, PER_CLASS = 50, 12


@given(total=st.integers(1, 10**6), share=st.floats(0, 1), seed=st.integers(0, 2**62))
def test_one_sample_is_drawn_from_each_of_equal_runs(total: int, share: float, seed: int) -> None:
    count = 1 + int(share * min(total - 1, 2000))
    found = Limits(count, seed=seed).of(total)
    if count == total:
        assert found is None
        return
    assert found is not None
    # The runs divide the source evenly, in whole samples; sample i of the draw lies in run i.
    ends = [run * total // count for run in range(count + 1)]
    assert all(start <= index < end for start, index, end in zip(ends, found.tolist(), ends[1:], strict=False))


def test_a_draw_depends_only_on_the_seed_and_is_uniform() -> None:
    hits = Counter[int]()
    for seed in range(300):
        found = Limits(20, seed=seed).of(100)
        assert found is not None
        again = Limits(20, seed=seed).of(100)
        np.testing.assert_array_equal(found, again)
        hits.update(found.tolist())
    # Each sample is drawn with probability 1/5: in 60 ± 6.9 of 300 draws.
    assert len(hits) == 100
    assert all(abs(times - 60) < 5 * 6.9 for times in hits.values())


def _by_class(folder: Path) -> Path:
    for label in range(CLASSES):
        (folder / f"{label:03d}").mkdir(parents=True)
        for number in range(PER_CLASS):
            (folder / f"{label:03d}" / f"{number:02d}.png").write_bytes(b"x")
    return folder


def test_a_draw_of_equal_class_folders_is_balanced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, drawn = open_source(_by_class(tmp_path)), open_source(tmp_path, limit=CLASSES * 3)
    assert set(Counter(sample.label for sample in drawn.samples).values()) == {3}
    assert set(drawn.samples) <= set(whole.samples)
    assert (drawn.fingerprint, drawn.drawn_from) == (whole.fingerprint, CLASSES * PER_CLASS)
    lines = [line for line in capsys.readouterr().err.splitlines() if "drawn evenly" in line]
    assert len(lines) == 1
    assert all(fact in lines[0] for fact in (f" {CLASSES * 3} ", f" {CLASSES * PER_CLASS} ", " 0;"))
    other = open_source(tmp_path, limit=CLASSES * 3, seed=1)
    assert list(other.samples) != list(drawn.samples)
    assert "drawn evenly" in capsys.readouterr().err


@pytest.mark.parametrize("limits", [{"limit": 600}, {"limit": 10_000}, {"limit_first": 7}])
def test_taking_all_or_the_first_samples_draws_nothing(
    tmp_path: Path, limits: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(_by_class(tmp_path), **limits)
    assert source.drawn_from is None
    assert "drawn evenly" not in capsys.readouterr().err
    assert [sample.name for sample in source.samples][:2] == ["000/00.png", "000/01.png"]
    assert len(source.samples) == limits.get("limit_first", CLASSES * PER_CLASS)


def test_invalid_limits_are_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "limit_first", 4):
        open_source(_by_class(tmp_path), limit=4, limit_first=3)
    with refused(ConfigError, "seed", -1):
        open_source(tmp_path, limit=4, seed=-1)
    for name in ("limit", "limit_first"):
        with refused(ConfigError, name, 0):
            open_source(tmp_path, **dict[str, Any]({name: 0}))


def test_blocks_of_a_draw_count_the_drawn_rows_of_each_row_group(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("L", (2, 2)).save(stream, "PNG")
    pq.write_table(pa.table({"image": [stream.getvalue()] * 20}), tmp_path / "x.parquet", row_group_size=4)
    rows = [int(sample.name.rpartition("#")[2]) for sample in open_source(tmp_path, limit=7, seed=3).samples]
    blocks = open_source(tmp_path, limit=7, seed=3).blocks
    assert blocks is not None
    assert blocks.tolist() == list(Counter(row // 4 for row in rows).values())


class Counted:
    """A data set that records which items are read."""

    read: tuple[int, ...] = ()

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        type(self).read += (index,)
        return Image.new("L", (2, 2), index), index // 10


def test_labels_of_a_custom_data_set_are_read_only_for_drawn_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_counted", sys.modules[__name__])
    monkeypatch.setattr(Counted, "read", ())
    source = open_source("python:my_counted:Counted", limit=20)
    indices = [int(sample.name.rpartition("#")[2]) for sample in source.samples]
    assert set(Counted.read) == set(indices)
    assert [sample.label for sample in source.samples] == [index // 10 for index in indices]
    assert [sample.key for sample in source.samples] == [f"Counted-{index:08d}" for index in indices]
    assert Counter(sample.label for sample in source.samples) == dict.fromkeys(range(10), 2)
    assert source.drawn_from == 100
