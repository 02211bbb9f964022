"""The wording that users read. The files in wording/ show each command's help, errors and short answers.

Lines `  $ datamerge …` are run one after the other, in a folder of small files. The indented lines below show stdout,
then stderr, then the exit code in brackets if it is not 0. All other lines are prose. Only this test asserts wording;
other tests assert the class of an error, its field, numbers and exit codes. After a change of wording

    DATAMERGE_UPDATE_WORDING=1 pytest tests/command/test_wording.py

rewrites the files; read the diff.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from datamerge.cli import COMMANDS, cli
from tests.support.command import run_command
from tests.support.paths import GOLDEN

WORDING = Path(__file__).parent / "wording"
FILES = sorted(WORDING.glob("*.txt"))
# A command, and below it indented or empty lines up to the next command or prose.
BLOCK = re.compile(r"^  \$ (.*)\n((?!  \$ )(?:  .*)?\n)*", re.MULTILINE)
UPDATE = bool(os.environ.get("DATAMERGE_UPDATE_WORDING"))
# The same everywhere: no colours, and lines as wide as in a small terminal.
TERMINAL = {"NO_COLOR": "1", "COLUMNS": "80", "DATAMERGE_QUIET": "", "DATAMERGE_VERBOSE": ""}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that the commands in wording/ may name.

    photos/{cat,dog}/N.png  six images of 8×8 pixels
    x.npz                   the same six images with labels
    art, bare               artifacts of 4 groups in two shards: all that can be stored, and moments only
    damaged                 `art` with one group's pixels changed
    run                     a finished run on `art`
    notes.txt, empty/       neither images nor an artifact
    """
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    for index, image in enumerate(pixels):
        path = tmp_path / "photos" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.savez("x.npz", images=pixels, labels=np.arange(6) % 2)
    shutil.copytree(GOLDEN / "v1" / "webdataset-uint8_moments-full", "art")
    shutil.copytree(GOLDEN / "v1" / "zarr-float32-bare", "bare")
    shutil.copytree("art", "damaged")
    with tarfile.open("damaged/shards/00001.tar") as shard:
        member = shard.getmember("dog_2.sum.npy")
    with Path("damaged/shards/00001.tar").open("r+b") as file:
        file.seek(member.offset_data + member.size - 1)
        file.write(b"!")
    Path("notes.txt").write_text("nothing of ours\n")
    Path("empty").mkdir()
    trained = run_command("train", "art", "run", "--encoder", "mlp:3x2x2-4", "--steps", "2", **TERMINAL)
    assert trained.returncode == 0, trained.stderr
    return tmp_path


def _shown(command: str, here: Path) -> str:
    """The command and its output, indented, and an empty line."""
    program, *arguments = shlex.split(command)
    assert program == "datamerge", command
    # Load all commands, so that the output does not depend on the tests that ran before.
    for name in COMMANDS:
        cli.get_command(click.Context(cli), name)
    done = run_command(*arguments, **TERMINAL)
    printed = (done.stdout + done.stderr).rstrip().replace(str(here), "$PWD")
    # Progress and seconds differ from run to run.
    printed = re.sub(r"^\w+: \d+/\d+ \w+, .*\n?", "", printed, flags=re.MULTILINE)
    printed = re.sub(r"\b\d+(\.\d+)? s\b", "… s", printed)
    lines = [f"$ {command}", *printed.splitlines(), *([f"[{done.returncode}]"] if done.returncode else [])]
    return "".join(f"  {line}".rstrip() + "\n" for line in lines) + "\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_commands_print_what_the_files_show(file: Path, here: Path) -> None:
    text = file.read_text("utf-8")
    now = BLOCK.sub(lambda block: _shown(block[1], here), text).rstrip("\n") + "\n"
    if UPDATE:
        file.write_text(now, "utf-8")
    assert now == file.read_text("utf-8")


def test_every_command_has_its_file() -> None:
    assert {file.stem for file in FILES} == {"datamerge", *COMMANDS}
