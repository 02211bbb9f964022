"""Addresses that a user typed, checked before a library retries for minutes or makes a folder called `s3:`."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from storage_schemas import ConfigError

SECONDS = 10.0


def check_cluster_address(address: str) -> None:
    """Raise ConfigError where HOST:PORT of a Ray cluster, also as ray://HOST:PORT, takes no connection.

    Other addresses, such as `auto`, are Ray's to find.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--ray-address {address!r}: expected a Ray cluster, found nothing that takes connections there ({error})"
        ) from None


def local_path(text: str, what: str) -> Path:
    """A folder of this machine, absolute.

    Args:
        what: is to be written there, for the message.

    Raises:
        ConfigError: a URL.
    """
    if "://" in text:
        raise ConfigError(
            f"{text}: expected a folder of this machine for {what}, found a URL; copy it there afterwards"
        )
    return Path(text).expanduser().absolute()
