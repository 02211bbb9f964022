"""Messages about workers that die, and which failures are retried."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_service.failures import cause_of_death, is_lasting, remedy_of_starts
from merge_service.work_queue import Piece, WorkQueue
from storage_schemas import ConfigError

# Messages of Ray 2.60.
EXIT = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: _RayWorker\n\tip: 192.0.2.2\n"
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker exits unexpectedly. Worker exits with an exit code usage."
)
RAISED = (
    "The actor died because of an error raised in its creation task, ray::_RayWorker.__init__() (pid=28172)\n"
    '  File "/lib/ray/_common/pydantic_compat.py", line 7, in <module>\n    import pydantic\n'
    '  File "/home/me/pydantic.py", line 1, in <module>\n    1/0\n    ~^~\nZeroDivisionError: division by zero'
)
KILLED = (
    "The actor died unexpectedly before finishing this task.\nWorker exit type: SYSTEM_ERROR Worker exit detail: "
    "Worker unexpectedly exits with a connection error code 2. End of file. (1) The process is killed by SIGKILL by "
    "OOM killer due to high memory usage."
)


@pytest.mark.parametrize(
    ("message", "facts"),
    [
        (EXIT, ["exit code usage"]),
        (RAISED, ["ZeroDivisionError: division by zero", "/home/me/pydantic.py"]),
        (KILLED, ["high memory usage"]),
        ("", ["unknown"]),
    ],
)
def test_the_cause_of_a_workers_death_is_found_in_rays_message(message: str, facts: list[str]) -> None:
    cause = cause_of_death(RuntimeError(message))
    assert [fact for fact in facts if fact not in cause] == []
    assert "\n" not in cause


def test_remedies_name_memory_or_files_that_shadow_modules(tmp_path: Path) -> None:
    assert "memory" in remedy_of_starts(cause_of_death(RuntimeError(KILLED)), tmp_path)
    assert "memory" not in remedy_of_starts(cause_of_death(RuntimeError(EXIT)), tmp_path)
    for name in ("numpy.py", "queue.py", "mine.py", "torch/__init__.py", "pandas/data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    remedy = remedy_of_starts(cause_of_death(RuntimeError(RAISED)), tmp_path)
    assert f"numpy.py, queue.py, torch in {tmp_path}" in remedy


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (ValueError("x"), True),
        (KeyError("x"), True),
        (AttributeError("x"), True),
        (ConfigError("x"), True),
        (RuntimeError("cuda"), False),
        (OSError(5, "x"), False),
        (MemoryError(), False),
    ],
)
def test_lasting_errors_are_not_retried(error: Exception, lasting: bool) -> None:
    assert is_lasting(error) is lasting
    queue = WorkQueue([Piece(0), Piece(1)], tries=3)
    piece = queue.take(0, 2, alone=False)
    assert piece is not None
    given_up = queue.failed([piece], "x", is_lasting(error))
    assert [(one.shard, one.tries) for one in given_up] == ([(0, 1)] if lasting else [])
    assert queue.gives_up(0) is lasting
