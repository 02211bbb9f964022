"""Classifies failures: temporary, of one shard, or of the whole job."""

from __future__ import annotations

import errno
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from datamerge.runtime.messages import first_line
from storage_schemas import DatamergeError, UserError
from storage_schemas.access.retries import is_transient

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}
_CLOSED = {errno.EROFS: "the file system is read-only", errno.EACCES: "no permission", errno.EPERM: "no permission"}
_LETTERS = 300  # length limit of a cause in a message
# Temporary errors of a disk; `is_transient` knows those of a network.
_MOMENTS = {errno.EIO, errno.ESTALE, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Errors about values, and deliberate refusals: a retry would raise them again.
_LASTING = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NotImplementedError, UserError)


def may_pass(error: Exception) -> bool:
    """Whether reading the same sample may succeed a little later: a temporary error of a network or disk."""
    if isinstance(error, DatamergeError) or is_hopeless(error):
        return False  # `Location` has its own retries
    return is_transient(error) or (isinstance(error, OSError) and error.errno in _MOMENTS)


def is_lasting(error: BaseException) -> bool:
    """Whether a shard that failed with this error would fail again."""
    return isinstance(error, _LASTING)


def is_hopeless(error: BaseException) -> bool:
    """Whether every other shard would fail in the same way, so that the job should stop at once."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in {**_FULL, **_CLOSED})


def explain(error: BaseException, where: str) -> DatamergeError:
    """A one-line error for a failure that ends the job; `where` is the artifact."""
    if isinstance(error, DatamergeError):
        return error
    known = {**_FULL, **_CLOSED}.get(error.errno or 0) if isinstance(error, OSError) else None
    reason = f"cannot write: {known}" if known else first_line(error)
    return DatamergeError(
        f"{where}: {reason}; finished shards are kept, remove the cause and run the same command again"
    )


def cause_of_death(error: BaseException) -> str:
    """Why a worker died, in one line of Ray's long message: its exception and file, or how its process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    places = [found[1] for line in lines if (found := re.match(r'File "([^"]+)", line \d+', line))]
    if places:  # a traceback; its last line is the exception
        return f"{lines[-1]} ({places[-1]})"[:_LETTERS]
    known = [line for line in lines if re.search(r"exit|memory|node", line, re.IGNORECASE)]
    cause = (known or lines or ["unknown"])[-1]
    return cause.rpartition("Worker exit detail: ")[2].rstrip(".")[:_LETTERS]


def remedy_of_starts(cause: str, folder: Path) -> str:
    """Advice for workers that die while they start; `folder` is the working directory of the job."""
    shadows = _shadows(folder)
    if re.search("memory", cause, re.IGNORECASE):
        return "give them more memory, e.g. by a smaller `max_workers`"
    if shadows:
        return f"rename {', '.join(shadows)} in {folder}, which hide libraries of the same name"
    return "remove the cause"


def _shadows(folder: Path) -> list[str]:
    """Modules in a folder that hide installed ones of the same name, as Ray searches the folder first."""
    elsewhere = [place for place in sys.path if place and Path(place).resolve() != folder.resolve()]
    found = []
    for path in sorted(folder.iterdir()):
        name = path.stem if path.suffix == ".py" else path.name
        if not name.isidentifier() or not (path.suffix == ".py" or (path / "__init__.py").is_file()):
            continue
        if name in sys.stdlib_module_names or PathFinder.find_spec(name, elsewhere) is not None:
            found.append(path.name)
    return found
