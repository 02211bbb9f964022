"""Retries: which failures are transient, and how long to wait before another attempt."""

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
# A server's Retry-After is honoured up to this many seconds per wait.
LONGEST_ASKED = 60.0

_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_ERRNOS = {errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EREMOTEIO}
# By name: the drivers (aiohttp; botocore; google.auth, azure) are optional, and their errors have no common base.
_CLASSES = {
    *("ClientConnectionError", "ClientPayloadError"),
    *("HTTPClientError", "IncompleteReadError", "ResponseParserError"),
    *("TransportError", "ServiceRequestError", "ServiceResponseError", "IncompleteRead"),
}
# Not seeded: waits do not affect results, and workers that share a seed must not wait in step.
_JITTER = random.SystemRandom()


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: time-outs, lost connections, 429 and 5xx answers.

    Causes count too: some drivers report every failure as a missing file.
    """
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _chain(error)):
        return False  # the certificate stays invalid, although drivers report it as a lost connection
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
    """Call `operation`, and repeat it after transient failures, waiting at least as long as the server asks for.

    Args:
        operation: may be called several times.
        transient: whether a failure is transient.
        delays: seconds to wait after each transient failure; one more call is made than there are delays. By default
            those of `backoff`.

    Raises:
        Exception: the error of the last call. Errors that are not transient are raised at once.
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
    """Seconds to wait between `ATTEMPTS` calls: they double from `FIRST_DELAY`, up to `LONGEST_DELAY`.

    Each is shortened by a random part, at most half, so that workers which failed together do not retry together.
    """
    for attempt in range(ATTEMPTS - 1):
        yield min(LONGEST_DELAY, FIRST_DELAY * 2**attempt) * _JITTER.uniform(0.5, 1.0)


def http_status(error: BaseException) -> int | None:
    """HTTP status of an error, or of one of its causes, as the drivers store it; None without one."""
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
    """Seconds of the server's Retry-After header (RFC 9110), at most `LONGEST_ASKED`; 0 without one."""
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
