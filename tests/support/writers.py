"""A program that runs writers in separate processes: many that are killed while they write, or two at once.

    python writers.py kill JOB.pickle FOLDER    the Nth killed writer leaves FOLDER/N, a finished one FOLDER/whole
    python writers.py race JOB.pickle FOLDER    two processes write FOLDER/N at the same time

The job is a pickled (layout, shards, provenance). The last line of output is a number of writers, or of rounds.

A writer of the first shard is killed at every call that changes the file system. In the other steps, which repeat
such calls, it is killed at the last call of each kind; a kind is a step of the merge, a call and a file.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_schemas import ArtifactWriter, Layout, Location, Record, open_artifact

ROUNDS = 12
FIRST_SHARD = "shard 0"
Job = tuple[Layout, list[list[Record]], dict[str, Any]]
Site = tuple[str, str, str]
"""A step of the merge, a call, and the name of its file with numbers replaced."""


def merge(folder: Path, job: Job, on_step: Callable[[str], None] = lambda step: None) -> None:
    """Do what a merge does: claim the folder, commit the missing shards, finish."""
    layout, shards, provenance = job
    writer = ArtifactWriter(Location(folder), layout, provenance)
    on_step("begin")
    writer.begin({"head.safetensors": b"head"})
    for shard in sorted(set(range(layout.shards)) - writer.committed()):
        on_step("another shard" if shard else FIRST_SHARD)
        writer.commit(shard, shards[shard], [])
    on_step("finish")
    writer.finish()
    on_step("card")
    writer.finish({"README.md": b"card"})


class KilledAt:
    """Kills this process at its Nth call that changes the file system.

    Attributes:
        step: the current step of the merge, which the merge sets.
        sites: sites of the calls so far.
    """

    def __init__(self, fatal: int | None) -> None:
        self.step = ""
        self.sites: list[Site] = []
        self._fatal, self._file = fatal, ""

    def point(self, call: str) -> None:
        if len(self.sites) == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if call == "fsync" and self.sites and self.sites[-1][1] == "os.rename":
            call = "fsync of the folder"
        self.sites.append((self.step, call, self._file))

    def install(self) -> None:
        """Audit events cover creating, renaming and removing; writing and fsync have none and are wrapped."""
        sys.addaudithook(self._audit)
        fdopen = os.fdopen

        def counted_fdopen(descriptor: int, mode: str) -> io.BufferedWriter:
            return HalfWay(fdopen(descriptor, mode), lambda: self.point("write"))  # type: ignore[return-value, arg-type]

        os.fsync = lambda fd: self.point("fsync")
        os.fdopen = counted_fdopen  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writing or event in ("os.mkdir", "os.chmod", "os.rename", "os.remove"):
            if isinstance(arguments[0], int):  # an open file, whose name came with an earlier event
                event = "fdopen"
            else:
                name = re.sub(r"^\.(.+)\.[^.]+\.tmp$", r"\1", Path(arguments[0]).name)
                self._file = "folder" if event == "os.mkdir" else re.sub(r"\d+", "#", name)
            self.point(event)


class HalfWay:
    """A stream whose process may be killed in the middle of a write."""

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


def kill(folder: Path, job: Job) -> int:
    if _writer(folder / "whole", job, None):
        return -1
    sites: list[Site] = [tuple(site) for site in json.loads((folder / "sites.json").read_text())]
    last = {site: call for call, site in enumerate(sites)}
    calls = sorted({*last.values(), *(call for call, site in enumerate(sites) if site[0] == FIRST_SHARD)})
    killed = [_writer(folder / str(number), job, call) for number, call in enumerate(calls)]
    return len(calls) if set(killed) == {-signal.SIGKILL} else -1


def _writer(folder: Path, job: Job, fatal: int | None) -> int:
    """Run a writer in its own process; return its exit code. A writer that ends lists its calls in `sites.json`."""
    child = os.fork()
    if child == 0:
        killed = KilledAt(fatal)
        killed.install()
        merge(folder, job, lambda step: setattr(killed, "step", step))
        (folder.parent / "sites.json").write_text(json.dumps(killed.sites))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def race(folder: Path, job: Job) -> int:
    """Two writers, released together in every round, and a reader that must never see a wrong value."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3, timeout=60)  # a process that fails must not leave the others waiting
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
    os.fsync = lambda fd: None  # data of a killed process stay; only a power cut would lose them
    loaded: Job = pickle.loads(Path(job_file).read_bytes())
    sys.stdout.write(f"{(kill if kind == 'kill' else race)(Path(target), loaded)}\n")
