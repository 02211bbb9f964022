"""Draws failures.svg of how-to/failures.md: a damaged byte is found, and the same command repairs its shard."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from docs.pictures.session import datamerge, digits

MERGE = "merge digits.npz means --grouping label --members 10 --groups-per-shard 10"
COLUMNS = 86
# rich's own frame loads a font from elsewhere.
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {terminal_width} {terminal_height}">
<style>
.{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
{styles}
</style>
<defs>
{lines}
</defs>
<rect width="100%" height="100%" fill="#ffffff"/>
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</svg>
"""


def damage(artifact: Path) -> None:
    """One bit of the largest file of the arrays."""
    files = (path for path in (artifact / "groups.zarr").rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def session(folder: Path) -> list[tuple[str, str]]:
    """Commands and what they print."""
    digits(folder / "digits.npz", 60)
    lines = [(f"datamerge {MERGE}", datamerge(MERGE, folder))]
    damage(folder / "means")
    lines.append(("# a bit of the disk turns", ""))
    for arguments, expected in (("verify means", 1), ("verify means --fix", 1), (MERGE, 0), ("verify means", 0)):
        lines.append((f"datamerge {arguments}", datamerge(arguments, folder, expected=expected)))
    return lines


def draw(path: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    with tempfile.TemporaryDirectory() as name:
        for command, printed in session(Path(name)):
            console.print(Text(command if command.startswith("#") else f"$ {command}", style="bold"))
            # Lines of progress are written over in a terminal.
            console.print(*(Text(line) for line in printed.splitlines() if not line.endswith(" left")), sep="\n")
    path.write_text(
        console.export_svg(theme=DEFAULT_TERMINAL_THEME, code_format=FRAME, unique_id="terminal"), "utf-8"
    )


if __name__ == "__main__":
    draw(Path(__file__).resolve().with_suffix(".svg"))
