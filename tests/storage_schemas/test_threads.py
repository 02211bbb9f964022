"""Waiting for a thread's result: a signal is handled although it does not wake the main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from storage_schemas.access.threads import result_of


class Arrived(Exception):
    pass


@pytest.fixture
def raised_on_a_signal() -> Iterator[type[Arrived]]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise Arrived

    before = signal.signal(signal.SIGUSR1, handler)
    yield Arrived
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_delivered_to_another_thread_ends_the_wait(raised_on_a_signal: type[Arrived]) -> None:
    go = threading.Event()

    def work() -> bool:
        go.wait(0.2)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        return go.wait(20)

    with ThreadPoolExecutor(1) as pool:
        try:
            with pytest.raises(raised_on_a_signal):
                result_of(pool.submit(work))
        finally:
            go.set()
