"""Errors of drivers as one line without secrets: the file, the server's answer, and the remedy."""

from __future__ import annotations

import errno

from storage_schemas.access.redaction import redact
from storage_schemas.access.retries import http_status, is_transient
from storage_schemas.errors import DatamergeError, SourceError, UserError

# Protocol → extra of this package that installs its driver.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
AGAIN = "run the same command again to continue"
_S3 = ("s3://", "s3a://")
# Text in a server's answer → remedy. Checked before the status: S3 has more error codes than HTTP has statuses.
_REMEDIES = {
    "expired": "make a new signature or token",
    "clock": "set the clock of this machine",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the region of the bucket",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the region of the bucket",
    "certificate": "add the server's certificate to those that this machine trusts",
}


class RangeError(DatamergeError):
    """The range begins past the end of the file."""


class Refused(UserError):
    """An answer that our driver refuses; its message lacks the file, which `explained` puts in front."""


class ChangedFile(Refused):
    """The file has changed since the previous request."""


class NoRanges(Refused):
    """A web server ignores byte ranges and sends the whole file."""


def explained(failure: Exception, where: str, *, is_signed: bool = False) -> Exception:
    """The error to raise in place of a driver's: FileNotFoundError for a missing file, else a one-line error.

    Args:
        failure: error of the driver.
        where: path or URL of the file, without secrets.
        is_signed: whether its URL has a query.
    """
    status = http_status(failure)
    if isinstance(failure, FileNotFoundError) and status in (None, 404, 410) and not is_transient(failure):
        return FileNotFoundError(errno.ENOENT, "no such file", where)
    if isinstance(failure, FileNotFoundError) and isinstance(failure.__cause__, Exception):
        failure = failure.__cause__  # some drivers report every failure as a missing file
    if status == 416:
        return RangeError(where)
    if status == 412 or isinstance(failure, Refused):
        return _not_as_asked(failure, where)
    return _failed(failure, where, status, is_signed)


def _failed(failure: Exception, where: str, status: int | None, is_signed: bool) -> DatamergeError:
    """The error for a failure other than a missing file, a bad range or a refused answer."""
    reason = redact((str(failure).strip() or type(failure).__name__).splitlines()[0])
    answer = reason if status is None or str(status) in reason else f"{status}: {reason}"
    remedy = next((remedy for text, remedy in _REMEDIES.items() if text.lower() in reason.lower()), None)
    if status in (401, 403) or isinstance(failure, PermissionError) or "Credential" in type(failure).__name__:
        return UserError(f"{where}: access refused ({answer}); {remedy or _credentials(where, is_signed)}")
    if isinstance(failure, TypeError) and "keyword argument" in reason:
        return UserError(f"{where}: the driver has no such option ({answer}); check the options of this location")
    if is_transient(failure) or (status is None and remedy is None):
        return DatamergeError(f"{where}: {type(failure).__name__}: {answer}; {remedy or AGAIN}")
    return UserError(f"{where}: the server refuses the request ({answer}); {remedy or 'check the URL'}")


def _not_as_asked(failure: Exception, where: str) -> DatamergeError:
    """The error for an answer that succeeded but is not usable."""
    if isinstance(failure, NoRanges):
        return UserError(
            f"{where}: expected a server that supports byte ranges, found {failure}; copy the file to this machine, "
            "or read an artifact through a `cache`"
        )
    if isinstance(failure, Refused) and not isinstance(failure, ChangedFile):
        return UserError(f"{where}: {failure}; copy the file to this machine")
    found = f" (found {failure})" if isinstance(failure, ChangedFile) else ""
    return SourceError(
        f"{where}: the file has changed since it was opened{found}; run the command again, or copy the file to this "
        "machine"
    )


def missing_driver(url: str, error: ImportError) -> str:
    """Advice on which driver to install for a URL."""
    protocol = url.partition("://")[0]
    extra = EXTRAS.get(protocol)
    hint = f"pip install 'datamerge[{extra}]'" if extra else str(error)
    return f"the driver for {protocol}:// is not installed; {hint}"


def _credentials(where: str, is_signed: bool) -> str:
    if is_signed:
        return "the signature may have expired or be for another file or method: make a new one for GET"
    if where.startswith(_S3):
        return (
            "check the credentials in the environment; a public bucket needs FSSPEC_S3_ANON=true, a requester-pays "
            "bucket FSSPEC_S3_REQUESTER_PAYS=true; if buckets differ, list their options in a file that "
            "DATAMERGE_STORAGE names"
        )
    return "check the credentials in the environment or the URL"
