"""Draws the pictures of the documentation, or those that are named: `python -m docs.pictures.draw [NAME …]`.

A `.dot` file becomes an SVG by Graphviz, a `.py` file beside this one is run and writes the picture of its name.
`pictures.json` keeps the hash of each source and of what it gave; a test compares both.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUMS = HERE / "pictures.json"
# One look for all diagrams. Helvetica stands for whatever sans serif the reader has.
_STYLE = {
    "G": "fontname=Helvetica fontsize=11 bgcolor=white color=#9e9e9e labeljust=l pad=0.1",
    "N": "fontname=Helvetica fontsize=12 shape=box style=rounded color=#3f51b5 height=0.3 width=0.3",
    "E": "fontname=Helvetica fontsize=10 arrowsize=0.7",
}


def sources() -> dict[str, Path]:
    """Source of each picture, by the picture's name."""
    tools = {Path(__file__).name, "session.py"}
    scripts = {path.stem: path for path in HERE.glob("*.py") if path.name not in tools}
    return dict(sorted((scripts | {path.stem: path for path in HERE.glob("*.dot")}).items()))


def picture(source: Path) -> Path:
    """What a source gives: an SVG, or a PNG where there are photos."""
    return next(path for path in map(source.with_suffix, (".png", ".svg")) if path.exists())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(source: Path) -> None:
    if source.suffix == ".dot":
        flags = [f"-{kind}{setting}" for kind, settings in _STYLE.items() for setting in settings.split()]
        subprocess.run(["dot", "-Tsvg", *flags, str(source), "-o", str(source.with_suffix(".svg"))], check=True)
    else:
        subprocess.run([sys.executable, "-m", f"docs.pictures.{source.stem}"], check=True)


def main(names: list[str]) -> None:
    sums = json.loads(SUMS.read_text("utf-8")) if SUMS.exists() else {}
    for name, source in sources().items():
        if not names or name in names:
            draw(source)
            result = picture(source)
            sums[result.name] = {"source": source.name, "source_sha256": sha256(source), "sha256": sha256(result)}
    SUMS.write_text(json.dumps(dict(sorted(sums.items())), indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
