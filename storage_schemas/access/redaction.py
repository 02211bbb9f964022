"""Masking of secrets in URLs and texts: user names, passwords and query values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# No scheme is longer than 31 characters; without a bound a long word would take quadratic time.
_URL = re.compile(r"\w[\w+.-]{0,30}://[^\s'\"<>]+")
# A password may contain slashes; digits and a slash after the colon are a port.
_USER = re.compile(r"(?<=://)(?:[^/?#]+|[^/?#:]*:(?!\d+/)[^?#]*)@")
_QUERY = re.compile(r"(?<=[?&#;])([^=&]+)=(?:[^&),]|,(?=[^&)]))*")
_BARE_QUERY = re.compile(r"(?<=[?&])[^=&),]+(?=[&),]|$)")


def redact(text: str) -> str:
    """A URL, or a text that contains URLs, with user names, passwords and query values masked.

    Examples:
        >>> redact("https://user:password@host/artifact?sig=abc")
        'https://***@host/artifact?sig=***'
    """
    return _URL.sub(lambda url: _redact_url(url[0]), text)


def redact_tree(tree: Any) -> Any:
    """A JSON tree with every string redacted."""
    if isinstance(tree, Mapping):
        return {redact(key): redact_tree(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [redact_tree(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def split_query(url: str) -> tuple[str, str]:
    """A URL without its query, and the query with its question mark; only http(s) URLs have one."""
    base, mark, query = url.partition("?") if _is_http(url) else (url, "", "")
    return base, mark + query


def _redact_url(url: str) -> str:
    if _is_http(url):  # in other URLs a question mark is a wildcard
        url = _BARE_QUERY.sub("***", url)
    return _QUERY.sub(r"\1=***", _USER.sub("***@", url))


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))
