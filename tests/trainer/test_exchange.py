"""Gradients that are summed over processes while others are still computed: sums, order, and failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from storage_schemas import DatamergeError
from tests.support import ranks
from tests.support.refusals import refused
from trainer.run import exchange
from trainer.run.distributed import Processes

WHOLE = 2**30
PARTS = (1, 40, WHOLE)  # bytes: a bucket for each parameter, for some, for all
ALONE = [[[0, 1, 2, 3, 4, 5]]]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return ranks.step_once(0, 1, ALONE, WHOLE)


@pytest.mark.parametrize(
    "shares",
    [[[[0], [1, 2]], [[3], [4, 5]]], [[[0, 1], [2]], [], [[3, 4, 5]]]],
    ids=["two", "three, one without groups"],
)
def test_sums_equal_those_of_one_process(
    alone: dict[str, Any], shares: list[list[list[int]]], tmp_path: Path
) -> None:
    """With buckets of any size, several micro-batches, and a pass that fails after buckets were sent."""
    world = len(shares)
    working = sum(bool(share) for share in shares)
    cases = [
        {"shares": shares, "bucket_bytes": size, "breaks": breaks}
        for size in PARTS
        for breaks in ([], [world - 1], [0, world - 1])
    ]
    for said in ranks.step(world, tmp_path, cases):
        assert len(said) == len(cases)
        for found in said:
            spare = {name: found["gradients"].pop(name) for name in ("spare.weight", "spare.bias")}
            assert spare == {"spare.weight": [[0, 0]], "spare.bias": [0]}
            assert found["gradients"] == alone["gradients"]
            #  first, second.weight, spare, last
            assert found["sums"] == [6, working, working, working, 0, 0, working, working]


def test_all_processes_send_the_same_buckets_as_early_as_possible(tmp_path: Path) -> None:
    """Buckets of one parameter: those before the spare layer, which is not used, are sent before the pass ends."""
    early = ["sum of 2", "sum of 6"]  # bias and weight of the last layer
    rest = ["sum of 1", "sum of 2", "sum of 9", "sum of 3", f"sum of {12 + 1 + 7}"]
    shares = [[[0, 1], [2]], [], [[3, 4, 5]]]
    said = ranks.step(3, tmp_path, [{"shares": shares, "bucket_bytes": 1, "breaks": [2]}])
    assert [found["events"] for (found,) in said] == [
        ["first layer", *early, "first layer", "finish", *rest],
        ["finish", *early, *rest],
        [*early, "first layer", "finish", *rest],
    ]


def test_a_gradient_that_changes_after_it_was_sent_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There are two backward passes where one is the last, as with reentrant checkpoints of a shared layer."""
    monkeypatch.setattr(exchange, "BUCKET_BYTES", 1)
    monkeypatch.setattr(Processes, "start_sum", lambda self, flat: None)
    layer = nn.Linear(2, 1)
    summed = exchange.Exchange(Processes(0, 2), list(layer.parameters()))
    layer(torch.ones(2)).backward()  # an earlier pass, which sends nothing
    with summed.sending(last=True):
        layer(torch.ones(2)).backward()
        with refused(DatamergeError, None, "use_reentrant=False"):
            layer(torch.ones(2)).backward()


def test_runs_of_two_processes_are_the_same_bit_for_bit(make_artifact: Callable[..., str], tmp_path: Path) -> None:
    """Two processes add in one order, whatever the size of buckets, and if one of them repeats a step."""
    shared = {
        "artifact": make_artifact(), "steps": 5, "batch_size": 4, "accumulate": 2, "learning_rate": 1e-2, "threads": 1
    }  # fmt: skip
    ways: dict[str, dict[str, Any]] = {
        "flat": {"bucket_bytes": WHOLE},
        "cut": {"bucket_bytes": 1},
        "again": {"bucket_bytes": 1, "unordered": {"at": 4, "who": 0}},
    }
    outcomes = ranks.launch(
        2, [{**shared, "run": str(tmp_path / name), **way} for name, way in ways.items()], tmp_path
    )
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert ["without a deterministic kernel" in text for _, text in outcomes] == [True, False]
    flat, *others = [load_file(tmp_path / name / "encoder.safetensors") for name in ways]
    for other in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in flat.items())


@pytest.mark.parametrize(
    ("shares", "breaks", "error"),
    [([[[0]], [[99]]], [], "IndexError"), ([[[0]], [[1]]], [1], "RuntimeError broken off")],
    ids=["before it sent anything", "between two buckets"],
)
def test_a_process_that_fails_during_a_sum_ends_both(
    shares: list[list[list[int]]], breaks: list[int], error: str, tmp_path: Path
) -> None:
    """Both end within seconds: the other one has sent all its buckets and loses contact."""
    for (code, text), expected in zip(
        ranks.fail(2, tmp_path, {"shares": shares, "bucket_bytes": 1, "breaks": breaks}),
        ("DatamergeError lost contact with the other processes of this run", error),
        strict=True,
    ):
        assert code == 0, text
        assert text.startswith(expected)
        assert float(text.rpartition("AFTER ")[2]) < 20
