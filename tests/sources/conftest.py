"""The servers of the tests of remote artifacts, for sources too."""

from __future__ import annotations

from tests.storage_schemas.remote.conftest import bucket, quick, s3, s3_server, web

__all__ = ["bucket", "quick", "s3", "s3_server", "web"]
