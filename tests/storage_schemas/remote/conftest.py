"""Server fixtures for the tests of remote artifacts."""

from __future__ import annotations

from tests.support.servers import bucket, quick, s3, s3_server, web

__all__ = ["bucket", "quick", "s3", "s3_server", "web"]
