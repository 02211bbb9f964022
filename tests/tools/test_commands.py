"""`datamerge convert | combine | diff | export | remerge` as commands: output, JSON, exit codes, one-line errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas import ArraySpec, ArtifactWriter, ExactMoments, Layout, Location, Record, open_artifact
from tests.support.command import run_command

SHAPE = (3, 8, 8)
PROVENANCE: dict[str, Any] = {
    "seed": 0,
    "source": {"fingerprint": "f0"},
    "attack": {"kind": "pgd", "epsilon": "2/255"},
}


def make(folder: Path, keys: str = "abcd", seed: int = 0, provenance: Mapping[str, Any] = PROVENANCE) -> str:
    """Write an artifact of groups of 4 members, one group a shard; return its path."""
    layout = Layout(
        format="zarr",
        encoding="uint8_moments",
        arrays=(
            ArraySpec(name="sum", dtype="uint16", shape=SHAPE),
            ArraySpec(name="scatter", dtype="uint32", shape=SHAPE),
        ),
        groups=len(keys),
        groups_per_shard=1,
    )
    writer = ArtifactWriter(Location(folder), layout, {**provenance, "seed": seed})
    writer.begin({})
    for shard, key in enumerate(keys):
        members = np.random.default_rng([seed, ord(key)]).integers(0, 256, (4, *SHAPE)).astype(np.uint8)
        moments = ExactMoments.of(members)
        arrays = {"sum": moments.sum.astype("u2"), "scatter": moments.scatter.astype("u4")}
        writer.commit(shard, [Record(key, 4, "uint8_moments", arrays)], [])
    writer.finish()
    return str(folder)


def test_convert_is_reversible(tmp_path: Path) -> None:
    a, b, c = make(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")
    done = run_command("convert", a, b, "--format", "webdataset", "--encoding", "float32")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, b)
    assert "4/4 groups" in done.stderr
    back = run_command("convert", b, c, "--format", "zarr", "--encoding", "uint8_moments", "--json")
    facts = json.loads(back.stdout)
    assert facts == {
        "artifact": c,
        "groups": 4,
        "shards": 4,
        "bytes": facts["bytes"],
        "format": "zarr",
        "encoding": "uint8_moments",
    }
    equal = run_command("diff", a, c)
    assert (equal.returncode, equal.stdout) == (0, "equal: 4 groups\n")
    again = run_command("convert", b, c, "--format", "zarr", "--encoding", "uint8_moments", "--json")
    assert json.loads(again.stdout) == facts


def test_combine_unites_groups_and_diff_lists_differences(tmp_path: Path) -> None:
    a, b, union = make(tmp_path / "a"), make(tmp_path / "b", "bcde", 1), str(tmp_path / "u")
    done = run_command("combine", a, b, union, "--json")
    assert json.loads(done.stdout)["groups"] == 5
    assert {record.key: record.count for record in open_artifact(union)} == {"a": 4, "b": 8, "c": 8, "d": 8, "e": 4}
    different = run_command("diff", a, union)
    assert different.returncode == 1
    assert f"only in {union}: e" in different.stdout
    assert "b: count 4 | 8, mean differs by" in different.stdout
    assert "3 of 4 common groups differ, 0 are in A only, 1 in B only" in different.stdout
    facts = json.loads(run_command("diff", a, union, "--json").stdout)
    assert (facts["equal"], facts["only_in_b"], len(facts["different"])) == (False, ["e"], 3)


def test_combine_refuses_differences_and_names_the_flag_that_allows_them(tmp_path: Path) -> None:
    other = {**PROVENANCE, "attack": {"kind": "apgd", "epsilon": "4/255"}}
    a, b, union = make(tmp_path / "a"), make(tmp_path / "b", seed=1, provenance=other), str(tmp_path / "u")
    refused = run_command("combine", a, b, union)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
    assert "'2/255'" in refused.stderr
    assert not Path(union).exists()
    advice = refused.stderr[refused.stderr.index("--allow-different") :].split()
    assert run_command("combine", a, b, union, *advice).returncode == 0


def test_export_writes_npz_and_png(tmp_path: Path) -> None:
    a = make(tmp_path / "a")
    done = run_command("export", a, "b", "d", "-o", str(tmp_path / "out"), "--json")
    assert json.loads(done.stdout) == {"output": str(tmp_path / "out"), "files": ["b.npz", "d.npz"]}
    pictures = run_command("export", a, "b", "-o", str(tmp_path / "out"), "--to", "png")
    assert (pictures.returncode, pictures.stdout) == (0, f"{tmp_path / 'out'}: 2 files\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.npz", "d.npz", "b.mean.png", "b.variance.png"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "{a}", "{none}/x/y", "--format", "hdf5"), 2, "hdf5"),
        (("convert", "{none}", "{new}"), 2, "manifest.json"),
        (("convert", "{a}", "{file}"), 2, "'file'"),
        (("convert", "{a}", "{full}"), 2, "thesis.tex"),
        (("convert", "{a}", "nosuch://x"), 2, "nosuch"),
        (("combine", "{a}", "{new}"), 2, "error: artifacts: "),
        (("combine", "{a}", "{a}", "{new}"), 2, "seed"),
        (("combine", "{a}"), 2, "OUTPUT"),
        (("diff", "{a}", "{none}"), 2, "manifest.json"),
        (("diff", "{a}", "{a}", "--tolerance", "-1"), 2, "tolerance"),
        (("diff", "{a}", "{damaged}"), 2, "sum/c/1/"),
        (("convert", "{damaged}", "{new}"), 1, "sum/c/1/"),
        (("export", "{a}", "zz", "-o", "{new}"), 2, "'zz'"),
        (("export", "{a}"), 2, "KEYS"),
    ],
)
def test_mistakes_are_one_line_errors(tmp_path: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    names = {name: str(tmp_path / name) for name in ("a", "none", "new", "file", "full", "damaged")}
    make(tmp_path / "a")
    make(tmp_path / "damaged")
    (tmp_path / "damaged" / "groups.zarr" / "sum" / "c" / "1" / "0" / "0" / "0").write_bytes(b"")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    done = run_command(*(argument.format(**names) for argument in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(errors) == 1


def test_an_interrupted_conversion_is_finished_by_the_same_command(tmp_path: Path) -> None:
    """After Ctrl-C the finished shards stay, and the same command converts the rest."""
    keys = "".join(chr(code) for code in range(ord("A"), ord("Z") + 1)) + "abcdefghijklmnopqrstuvwxyz"
    a, b = make(tmp_path / "a", keys), tmp_path / "b"
    command = [sys.executable, "-m", "datamerge", "convert", a, str(b), "--format", "webdataset"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (b / "commits").exists() or len(list((b / "commits").glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert 3 <= len(list((b / "commits").glob("0*.json"))) < len(keys)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert run_command("diff", a, str(b)).returncode == 0


def test_remerge_takes_the_first_members_and_refuses_impossible_settings(tmp_path: Path) -> None:
    members = np.random.default_rng(0).integers(0, 256, (2, 4, *SHAPE)).astype(np.uint8)
    arrays = [("sum", "uint16", SHAPE), ("scatter", "uint32", SHAPE), ("members", "uint8", (4, *SHAPE))]
    layout = Layout(
        format="webdataset",
        encoding="uint8_moments",
        arrays=tuple(ArraySpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in arrays),  # type: ignore[arg-type]
        groups=2,
        groups_per_shard=1,
    )
    writer = ArtifactWriter(Location(tmp_path / "a"), layout, {"seed": 0, "grouping": {"kind": "adversarial"}})
    writer.begin({})
    for shard, group in enumerate(members):
        moments = ExactMoments.of(group)
        stored = {"sum": moments.sum.astype("u2"), "scatter": moments.scatter.astype("u4"), "members": group}
        writer.commit(shard, [Record(f"k{shard}", 4, "uint8_moments", stored)], [])
    writer.finish()
    source, target = str(tmp_path / "a"), str(tmp_path / "b")
    done = run_command("remerge", source, target, "--members", "3", "--factors", "1", "--drop-members", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["groups"] == 2
    for record, group in zip(open_artifact(target), members, strict=True):
        np.testing.assert_array_equal(record.arrays["sum"], group[:3].sum(axis=0, dtype=int))
        assert record.arrays["factors"].shape == (1, *SHAPE)
    for arguments, facts in (
        ([source, target, "--members", "2"], [f"error: {target} ", " there, "]),
        ([source, str(tmp_path / "c"), "--members", "5"], ["error: --members: ", " 4 ", " 5"]),
        ([target, str(tmp_path / "c")], [f"error: {target}: ", "--keep-members"]),
    ):
        wrong = run_command("remerge", *arguments)
        assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
        assert [fact for fact in facts if fact not in wrong.stderr] == []
