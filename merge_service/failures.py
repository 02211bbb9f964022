"""What a failure means: for a moment, for one shard, or for the whole job."""

from __future__ import annotations

import errno
import re

from datamerge.runtime.messages import first_line
from storage_schemas import DatamergeError, UserError
from storage_schemas.access.retries import is_transient

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}
_CLOSED = {errno.EROFS: "the file system is read-only", errno.EACCES: "no permission", errno.EPERM: "no permission"}
# A disk's trouble for a moment; a network's is known to `is_transient`.
_MOMENTS = {errno.EIO, errno.ESTALE, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# What is raised on purpose, or for values that are wrong: the same work would end in the same way.
_LASTING = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, NotImplementedError, UserError)


def may_pass(error: Exception) -> bool:
    """Whether reading the same sample may succeed a little later: trouble of a network or of a disk."""
    if isinstance(error, DatamergeError) or is_hopeless(error):
        return False  # `Location` has tried again for itself
    return is_transient(error) or (isinstance(error, OSError) and error.errno in _MOMENTS)


def is_lasting(error: BaseException) -> bool:
    """Whether a shard that failed with this would fail again."""
    return isinstance(error, _LASTING)


def is_hopeless(error: BaseException) -> bool:
    """Whether every other shard would meet the same failure, so that the job should stop at once."""
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
    """The line of Ray's long message that says why a worker died."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    known = [line for line in lines if re.search(r"exit|memory|node", line, re.IGNORECASE)]
    return (known or lines or ["unknown"])[-1][:300]
