"""What a driver raised, as one line without secrets: where, what the server said, what to do about it."""

from __future__ import annotations

import errno

from storage_schemas.access.redaction import redact
from storage_schemas.access.retries import http_status, is_transient
from storage_schemas.errors import DatamergeError, SourceError, UserError

# Protocol → extra of this package that installs its driver.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
AGAIN = "run the same command again to continue"
_S3 = ("s3://", "s3a://")
# What a server says → what helps. Texts before numbers: S3 has more errors than HTTP has numbers.
_SAID = {
    "expired": "make a new signature or token",
    "clock": "set the clock of this machine",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the region of the bucket",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the region of the bucket",
    "certificate": "add the server's certificate to those that this machine trusts",
}


class RangeError(DatamergeError):
    """The range begins behind the end of the file."""


class Refused(UserError):
    """A driver's own refusal; where that was is put in front of it."""


class ChangedFile(Refused):
    """A file is another one than the request before saw."""


class NoRanges(Refused):
    """A web server sends a file whole, whichever range is asked for."""


def explained(failure: Exception, where: str, *, is_signed: bool = False) -> Exception:
    """The error to raise for what a driver raised: FileNotFoundError for a missing file, else one line.

    Args:
        where: the file, as it may be shown.
        is_signed: whether its URL has a query.
    """
    status = http_status(failure)
    if isinstance(failure, FileNotFoundError) and status in (None, 404, 410) and not is_transient(failure):
        return FileNotFoundError(errno.ENOENT, "no such file", where)
    if isinstance(failure, FileNotFoundError) and isinstance(failure.__cause__, Exception):
        failure = failure.__cause__  # some drivers call every failure a missing file
    if status == 416:
        return RangeError(where)
    if status == 412 or isinstance(failure, Refused):
        return _not_as_asked(failure, where)
    return _failed(failure, where, status, is_signed)


def _failed(failure: Exception, where: str, status: int | None, is_signed: bool) -> DatamergeError:
    """The error for a failure that has no meaning of its own."""
    reason = redact((str(failure).strip() or type(failure).__name__).splitlines()[0])
    said = reason if status is None or str(status) in reason else f"{status}: {reason}"
    remedy = next((remedy for text, remedy in _SAID.items() if text.lower() in reason.lower()), None)
    if status in (401, 403) or isinstance(failure, PermissionError) or "Credential" in type(failure).__name__:
        return UserError(f"{where}: access refused ({said}); {remedy or _credentials(where, is_signed)}")
    if isinstance(failure, TypeError) and "keyword argument" in reason:
        return UserError(f"{where}: the driver has no such option ({said}); check the options of this location")
    if is_transient(failure) or (status is None and remedy is None):
        return DatamergeError(f"{where}: {type(failure).__name__}: {said}; {remedy or AGAIN}")
    return UserError(f"{where}: the server refuses the request ({said}); {remedy or 'check the URL'}")


def _not_as_asked(failure: Exception, where: str) -> DatamergeError:
    """The error for an answer that is no failure to the server."""
    if isinstance(failure, NoRanges):
        return UserError(
            f"{where}: expected a server that knows byte ranges, found {failure}; copy the file to this machine, or "
            "read an artifact through a `cache`"
        )
    if isinstance(failure, Refused) and not isinstance(failure, ChangedFile):
        return UserError(f"{where}: {failure}; copy the file to this machine")
    found = f" (found {failure})" if isinstance(failure, ChangedFile) else ""
    return SourceError(
        f"{where}: another file has this name than when it was opened{found}; run the command again, or copy "
        "the file to this machine"
    )


def missing_driver(url: str, error: ImportError) -> str:
    """What to install for a URL."""
    protocol = url.partition("://")[0]
    extra = EXTRAS.get(protocol)
    hint = f"pip install 'datamerge[{extra}]'" if extra else str(error)
    return f"the driver for {protocol}:// is not installed; {hint}"


def _credentials(where: str, is_signed: bool) -> str:
    if is_signed:
        return "the signature may have expired or be for another file or method: make a new one for GET"
    if where.startswith(_S3):
        return (
            "check the credentials in the environment; a public bucket needs FSSPEC_S3_ANON=true, one whose readers "
            "pay FSSPEC_S3_REQUESTER_PAYS=true; where buckets differ, give each its own in a file DATAMERGE_STORAGE"
        )
    return "check the credentials in the environment or the URL"
