"""Driver options: per URL from the file that `DATAMERGE_STORAGE` names, global ones from fsspec's variables.

    # storage.toml
    ["s3://public-photos"]
    anon = true
    ["s3://paid-photos"]
    requester_pays = true
    ["s3://ours"]
    endpoint_url = "https://host/s3"

A table applies to its URL and everything below it; the table with the longest URL wins. Options given in Python
override those of the file.
"""

from __future__ import annotations

import inspect
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any

import fsspec

from storage_schemas.access.local_paths import user_path
from storage_schemas.access.redaction import redact
from storage_schemas.errors import ConfigError, shortened

VARIABLE = "DATAMERGE_STORAGE"
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def options_for(url: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The driver options for a URL.

    Args:
        url: without its query.
        given: options given in Python, which override those of the file.

    Raises:
        ConfigError: the file cannot be read, or a boolean variable has another value than true or false.
    """
    for protocol in re.findall(r"(\w[\w+.-]*)://", url):
        _correct_variables(protocol)
    file = os.environ.get(VARIABLE)
    if not file or "://" not in url:
        return dict(given)
    places = {place: table for place, table in _read(file).items() if f"{url}/".startswith(f"{place.rstrip('/')}/")}
    return {**(places[max(places, key=len)] if places else {}), **given}


def _read(file: str) -> dict[str, dict[str, Any]]:
    try:
        places = tomllib.loads(user_path(file).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{VARIABLE}: expected a TOML file, found {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{VARIABLE}: {file} is not valid TOML: {error}") from None
    for place, table in places.items():
        if "://" not in place or not isinstance(table, dict):
            raise ConfigError(
                f'{VARIABLE}: {file}: expected tables named by URLs, such as ["s3://bucket"], found {redact(place)!r}'
            )
    return places


def _correct_variables(protocol: str) -> None:
    """Parse the booleans in FSSPEC_S3_ANON and similar variables: the driver would take the string `no` for true."""
    if not fsspec.config.conf or not protocol:
        return
    try:
        driver = fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError):  # the use of the driver raises a better error
        return
    parameters = inspect.signature(driver.__init__).parameters
    for name in [driver.protocol] if isinstance(driver.protocol, str) else driver.protocol:
        for option, value in fsspec.config.conf.get(name, {}).items():
            if option not in parameters or not isinstance(parameters[option].default, bool):
                continue
            meant = _BOOLEANS.get(str(value).strip().lower())
            if meant is None:
                found = shortened(value)
                raise ConfigError(f"FSSPEC_{name.upper()}_{option.upper()}: expected true or false, found {found}")
            fsspec.config.conf[name][option] = meant
