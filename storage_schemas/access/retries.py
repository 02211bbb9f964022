"""Retries: which failures may pass, and how long to wait for them."""

from __future__ import annotations

import errno
import random
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 6
FIRST_DELAY, LONGEST_DELAY = 0.2, 10.0
# What a server asks for is granted up to this many seconds a wait.
LONGEST_ASKED = 60.0

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
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _chain(error)):
        return False  # what nobody trusts will not be trusted later; the drivers call it a lost connection
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
    """Call `operation`, again after every transient failure, not before the time that a server asks for.

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
            delay = max(delay, _asked_for(error))
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


def _asked_for(error: BaseException) -> float:
    """Seconds that a server asks to be left alone for (RFC 9110, Retry-After), up to `LONGEST_ASKED`; else 0."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        headers = response.get("ResponseMetadata", {}).get("HTTPHeaders") if isinstance(response, dict) else None
        headers = headers or getattr(cause, "headers", None)
        if not isinstance(headers, Mapping):
            continue
        text = str({str(name).lower(): value for name, value in headers.items()}.get("retry-after", ""))
        if text.isdecimal():
            return min(float(text), LONGEST_ASKED)
    return 0.0


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
