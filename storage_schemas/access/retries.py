"""Retries: which failures may pass, and how long to wait for them."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 6
FIRST_DELAY, LONGEST_DELAY = 0.2, 10.0

_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_ERRNOS = {errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EREMOTEIO}
# By name: the drivers (aiohttp; botocore; google.auth; azure) are optional, and none of these has a common base.
_CLASSES = {
    *("ClientConnectionError", "ClientPayloadError"),
    *("HTTPClientError", "IncompleteReadError", "ResponseParserError"),
    *("TransportError", "ServiceRequestError", "ServiceResponseError", "IncompleteRead"),
}
# Waiting times influence no result; workers that share a seed must not wait in step.
_JITTER = random.SystemRandom()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: time-outs, lost connections, 429 and 5xx answers.

    Causes count too: some drivers call every failure a missing file.
    """
    for cause in _chain(error):
        if isinstance(cause, (ConnectionError, TimeoutError)):
            return True
        status = http_status(cause)
        if status is not None:
            return status in _STATUSES
        if _CLASSES & {base.__name__ for base in type(cause).__mro__}:
            return True
        if isinstance(cause, OSError) and cause.errno in _ERRNOS:
            return True
    return False


def retry(
    operation: Callable[[], T],
    *,
    transient: Callable[[Exception], bool] = is_transient,
    delays: Iterable[float] | None = None,
) -> T:
    """Call `operation`, again after every transient failure.

    Args:
        operation: may be called several times.
        transient: whether a failure may pass.
        delays: seconds to wait after each failure that may pass; one call more than there are delays is made. By
            default those of `backoff`.

    Raises:
        Whatever the last call raised.
    """
    for delay in backoff() if delays is None else delays:
        try:
            return operation()
        except Exception as error:
            if not transient(error):
                raise
        time.sleep(delay)
    return operation()


def backoff() -> Iterator[float]:
    """Seconds to wait between `ATTEMPTS` calls: they double from `FIRST_DELAY` to `LONGEST_DELAY`.

    A random part of each, up to half, is left out, so that workers which failed together do not return together.
    """
    for attempt in range(ATTEMPTS - 1):
        yield min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * _JITTER.uniform(0.5, 1.0)


def http_status(error: BaseException) -> int | None:
    """Status of the HTTP answer an error stands for, in the spellings of the drivers."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
        for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs
            status = getattr(cause, name, None)
            if isinstance(status, int):
                return status
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
