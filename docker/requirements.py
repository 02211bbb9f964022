"""Print what extras of pyproject.toml require, one requirement a line: `requirements.py merge,s3`.

The images install these before datamerge itself, so that a change of the code does not install them again.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """The dependencies and those of the extras, with datamerge[…] replaced by what it stands for."""
    known: dict[str, list[str]] = project["optional-dependencies"]
    found: list[str] = list(project["dependencies"])
    waiting, seen = list(extras), set[str]()
    while waiting:
        extra = waiting.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in known:
            raise SystemExit(f"expected extras among {', '.join(sorted(known))}; found {extra!r}")
        for line in known[extra]:
            own = re.fullmatch(r"datamerge\[(.+)\]", line)
            if own:
                waiting += own[1].split(",")
            else:
                found.append(line)
    return found


if __name__ == "__main__":
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
    sys.stdout.writelines(f"{line}\n" for line in requirements(project, sys.argv[1].split(",")))
