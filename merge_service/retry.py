"""What a failure means: for one sample, for a moment, for one shard, or for the whole job."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from typing import TypeVar

from storage_schemas import DatamergeError, UserError

T = TypeVar("T")

# Waits between the tries of a source's read; `Location` has its own for requests.
WAITS = (0.25, 1.0, 5.0, 20.0)

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}
_CLOSED = {errno.EROFS: "the file system is read-only", errno.EACCES: "no permission", errno.EPERM: "no permission"}


def is_hopeless(error: BaseException) -> bool:
    """Whether every other shard would meet the same failure, so that the job should stop at once."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in {**_FULL, **_CLOSED})


def explain(error: BaseException, where: str) -> DatamergeError:
    """A one-line error for a hopeless failure while writing to `where`."""
    if isinstance(error, DatamergeError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    reason = {**_FULL, **_CLOSED}.get(number or 0, first_line(error))
    return DatamergeError(
        f"{where}: cannot write: {reason}; finished shards are kept, mend that and run the same command again"
    )


def retrying(action: Callable[[], T]) -> T:
    """Carry out an idempotent action, again after a wait where a store fails for a moment.

    Raises:
        The last failure; at once what waiting cannot mend: full disks, wrong values, missing files.
    """
    for wait in WAITS:
        try:
            return action()
        except (ValueError, TypeError, ArithmeticError, LookupError, FileNotFoundError, DatamergeError):
            raise
        except Exception as error:  # every object store has its own exceptions
            if is_hopeless(error):
                raise
        time.sleep(wait)
    return action()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cause_of_death(error: BaseException) -> str:
    """What Ray knows of a worker's end, without the paragraphs around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    known = [line for line in lines if re.search(r"exit|memory|node", line, re.IGNORECASE)]
    return (known or lines or ["unknown"])[-1][:300]
