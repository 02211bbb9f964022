"""Errors while reading samples: which are rejects, which are retried, and which stop the merge."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from datamerge.sources import BadImage, RawImage, Sample
from merge_service import reading
from merge_service.failures import explain, is_hopeless, may_pass
from merge_service.reading import PixelReader
from storage_schemas import ConfigError, CorruptShard, DatamergeError
from storage_schemas.schema.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(shape=(3, 4, 5))
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)


class Store:
    """A reader that returns or raises the next of `answers` at each call."""

    def __init__(self, answers: list[RawImage | Exception], concurrent: bool = False) -> None:
        self.is_concurrent, self.is_remote = concurrent, False
        self._answers: Iterator[RawImage | Exception] = iter(answers)
        self.calls = 0

    def read(self, sample: Sample) -> RawImage:
        self.calls += 1
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WAITS", (0.0, 0.0))


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    return buffer.getvalue()


def _read(store: Store, resize: bool = True, threads: int = 1, count: int = 1) -> list[object]:
    samples = [Sample(str(number), str(number), None) for number in range(count)]
    return list(PixelReader(store, PREPROCESSING if resize else PREPROCESSING.of_exact_size(), threads).read(samples))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("concurrent", [False, True])
def test_any_number_of_threads_returns_the_same_pixels_in_order(threads: int, concurrent: bool) -> None:
    found = _read(Store([_png(), Image.fromarray(PIXELS)] * 4, concurrent), threads=threads, count=8)
    for pixels in found:
        np.testing.assert_array_equal(pixels, PIXELS.transpose(2, 0, 1))


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow"), OSError(errno.EIO, "disk")])
def test_temporary_errors_are_retried(error: Exception) -> None:
    store = Store([error, error, _png()])
    np.testing.assert_array_equal(_read(store)[0], PIXELS.transpose(2, 0, 1))
    assert store.calls == 3


@pytest.mark.parametrize(
    ("error", "reason", "calls"),
    [
        (FileNotFoundError(2, "No such file"), "No such file", 1),
        (PermissionError(13, "Permission denied"), "Permission denied", 1),
        (OSError("row 3 of x: the image column holds no bytes"), "row 3 of x", 1),
        (RuntimeError("a driver's own"), "a driver's own", 1),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", 3),
        (CorruptShard("x: a pipe"), "a pipe", 1),
        (BadImage("cut short"), "cut short", 1),
    ],
)
def test_lasting_errors_reject_the_sample(error: Exception, reason: str, calls: int) -> None:
    store = Store([error] * 5)
    assert reason in str(_read(store)[0])
    assert store.calls == calls


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError("slow")])
def test_an_unreachable_store_raises_and_rejects_nothing(error: Exception) -> None:
    with pytest.raises(type(error)):
        _read(Store([error] * 5))


def test_without_resizing_other_sizes_are_rejected() -> None:
    small = Image.fromarray(PIXELS[:, :4])
    (reason,) = _read(Store([small]), resize=False)
    assert {"5x4", "4x4"} <= set(str(reason).split())
    assert not isinstance(_read(Store([small]))[0], str)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.EIO, "disk"), True),
        (OSError(errno.ESTALE, "nfs"), True),
        (OSError("image file is truncated"), False),
        (RuntimeError("x"), False),  # errors of object stores have been retried already
        (TimeoutError("slow"), True),
        (ValueError("x"), False),
        (KeyError("x"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (FileNotFoundError(2, "x"), False),
        (ConfigError("x"), False),
    ],
)
def test_may_pass_is_true_of_temporary_errors_only(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


@pytest.mark.parametrize(
    ("error", "hopeless", "fact"),
    [
        (OSError(errno.ENOSPC, "No space left"), True, "disk"),
        (OSError(errno.EDQUOT, "quota"), True, "quota"),
        (OSError(errno.EROFS, "ro"), True, "read-only"),
        (ConfigError("other weights"), True, "other weights"),
        (OSError("503 slow down"), False, "503 slow down"),
        (ValueError("x"), False, "x"),
    ],
)
def test_hopeless_errors_are_recognised_and_all_errors_explained(error: Exception, hopeless: bool, fact: str) -> None:
    assert is_hopeless(error) is hopeless
    explained = explain(error, "out")
    assert isinstance(explained, DatamergeError)
    assert fact in str(explained)
    assert "\n" not in str(explained)
