"""The commit of this code, to record with a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str:
    """The commit of this checkout; `unknown` outside of one.

    It ends in `-dirty` if a Python or TOML file differs from the commit; other files, such as results, do not count.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    # An installed package may lie inside another repository.
    described = git("describe", "--always").stdout.strip() if (ROOT / ".git").exists() else ""
    if not described:
        return "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.toml").returncode == 1
    return f"{described}-dirty" if changed else described
