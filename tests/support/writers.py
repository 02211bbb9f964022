"""A program that runs writers in processes of their own: one that is killed at every write call, or two at once.

    python writers.py kill JOB.pickle FOLDER    FOLDER/N is what a writer leaves that is killed at its Nth call
    python writers.py race JOB.pickle FOLDER    FOLDER/N is written by two processes at the same time

The job is a pickled (layout, shards, provenance). The last line of output is a number of calls, or of rounds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_schemas import ArtifactWriter, Layout, Location, Record, open_artifact

ROUNDS = 12
Job = tuple[Layout, list[list[Record]], dict[str, Any]]


def merge(folder: Path, job: Job) -> None:
    """What a merge does: claim, commit the missing shards, finish."""
    layout, shards, provenance = job
    writer = ArtifactWriter(Location(folder), layout, provenance)
    writer.begin({"head.safetensors": b"head"})
    for shard in sorted(set(range(layout.shards)) - writer.committed()):
        writer.commit(shard, shards[shard], [])
    writer.finish()
    writer.finish({"README.md": b"card"})


class KilledAt:
    """Ends this process without a farewell before its Nth call that changes the file system."""

    def __init__(self, fatal: int) -> None:
        self._left = fatal

    def point(self) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def install(self) -> None:
        """Audit events cover creating, renaming and removing; bytes and syncs have none and are wrapped."""
        sys.addaudithook(self._audit)
        fsync, fdopen = os.fsync, os.fdopen

        def counted_fsync(descriptor: int) -> None:
            self.point()
            fsync(descriptor)

        def counted_fdopen(descriptor: int, mode: str) -> io.BufferedWriter:
            return HalfWay(fdopen(descriptor, mode), self.point)  # type: ignore[return-value, arg-type]

        os.fsync = counted_fsync  # type: ignore[assignment]
        os.fdopen = counted_fdopen  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writing or event in ("os.mkdir", "os.chmod", "os.rename", "os.remove"):
            self.point()


class HalfWay:
    """A stream whose process may die in the middle of a write."""

    def __init__(self, stream: io.BufferedWriter, point: Callable[[], None]) -> None:
        self._stream, self._point = stream, point

    def __enter__(self) -> HalfWay:
        return self

    def __exit__(self, *arguments: object) -> None:
        self._stream.close()

    def write(self, data: bytes) -> None:
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        self._point()
        self._stream.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def kill_everywhere(folder: Path, job: Job) -> int:
    fatal = 0
    while True:
        child = os.fork()
        if child == 0:
            KilledAt(fatal).install()
            merge(folder / str(fatal), job)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            return fatal if os.WEXITSTATUS(status) == 0 else -1
        fatal += 1


def race(folder: Path, job: Job) -> int:
    """Two writers, released together in every round, and a reader that must never see a wrong value."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3, timeout=60)  # one that fails must not leave the others waiting
    processes = [fork.Process(target=_compete, args=(folder, job, barrier)) for _ in range(2)]
    processes.append(fork.Process(target=_watch, args=(folder, job, barrier)))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return ROUNDS if all(process.exitcode == 0 for process in processes) else -1


def _compete(folder: Path, job: Job, barrier: Any) -> None:
    for number in range(ROUNDS):
        barrier.wait()
        merge(folder / str(number), job)


def _watch(folder: Path, job: Job, barrier: Any) -> None:
    expected = {record.key: record for shard in job[1] for record in shard}
    for number in range(ROUNDS):
        barrier.wait()
        seen: list[Record] = []
        while len(seen) < len(expected):
            if (folder / str(number) / "manifest.json").exists():
                seen = list(open_artifact(folder / str(number), partial=True))
                for record in seen:
                    arrays = expected[record.key].arrays
                    assert all((record.arrays[name] == arrays[name]).all() for name in arrays)


if __name__ == "__main__":
    kind, job_file, target = sys.argv[1:]
    loaded: Job = pickle.loads(Path(job_file).read_bytes())  # noqa: S301 - our own bytes
    sys.stdout.write(f"{(kill_everywhere if kind == 'kill' else race)(Path(target), loaded)}\n")
