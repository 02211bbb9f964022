"""Which commit of this code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str:
    """The commit of this checkout, `unknown` outside of one.

    It ends in `-dirty` where code or settings differ from the commit. Results, which runs write, may differ.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    # Installed elsewhere, the package may lie in a repository that is not ours.
    described = git("describe", "--always").stdout.strip() if (ROOT / ".git").exists() else ""
    if not described:
        return "unknown"
    changed = git("diff", "--quiet", "HEAD", "--", "*.py", "*.toml").returncode == 1
    return f"{described}-dirty" if changed else described
