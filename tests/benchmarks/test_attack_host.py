"""The benchmark of a worker's host time runs, at a tiny size."""

from __future__ import annotations

from benchmarks.attack_host import measure


def test_it_measures_every_part_of_every_repeat() -> None:
    found = measure(3, {"members": 2, "steps": 1, "groups_per_shard": 3}, 2, size=8)
    assert {name: len(values) for name, values in found.items()} == {"host": 2, "device": 2, "beside": 2}
    assert all(value > 0 for values in found.values() for value in values)
