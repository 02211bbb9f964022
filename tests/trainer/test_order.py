"""The global order as a function: a permutation per epoch, cut into batches and shares that cover it exactly once."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.permutation import looks_uniform
from trainer.data.order import SHUFFLE_WINDOW, Order, Partition, stream_seeds

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=20).filter(any)
SEEDS = st.integers(0, 2**32 - 1)
WINDOWS = st.one_of(st.none(), st.integers(1, 40))
# ImageNet's training set in shards of 256, sorted by its 1,000 classes as a folder is.
IMAGENET, CLASSES, BATCH = [256] * 5005, 1000, 128


def _epoch(order: Order, number: int = 0) -> list[int]:
    steps = range(number * order.steps_per_epoch, (number + 1) * order.steps_per_epoch)
    return [index for step in steps for index in order.batch(step).tolist()]


@given(SIZES, SEEDS, st.integers(0, 1000), WINDOWS)
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, epoch: int, window: int | None) -> None:
    order = _epoch(Order(sizes, 4, seed, window), epoch)
    assert sorted(order) == list(range(sum(sizes)))
    assert order == _epoch(Order(sizes, 4, seed, window), epoch)


@given(SEEDS, SEEDS, st.integers(0, 50), st.integers(0, 50), WINDOWS)
def test_different_seeds_and_epochs_have_different_orders(
    seed: int, other: int, epoch: int, later: int, window: int | None
) -> None:
    sizes = [16] * 8
    same = _epoch(Order(sizes, 8, seed, window), epoch) == _epoch(Order(sizes, 8, other, window), later)
    assert same == ((seed, epoch) == (other, later))


@given(SIZES, SEEDS, st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 60))
def test_the_batch_size_does_not_change_the_order(
    sizes: list[int], seed: int, window: int, batch: int, other: int, epoch: int
) -> None:
    assert _epoch(Order(sizes, batch, seed, window), epoch) == _epoch(Order(sizes, other, seed, window), epoch)


@given(SEEDS, st.integers(1, 30), st.integers(1, 200))
def test_only_the_shards_of_a_window_are_open_at_a_time(seed: int, shards: int, window: int) -> None:
    size = 5
    windows = min(-(-shards * size // window), shards)
    touched = np.array(_epoch(Order([size] * shards, 3, seed, window))) // size
    places = [np.flatnonzero(touched == shard) for shard in range(shards)]
    at_most = -(-shards // windows)  # shards of a window
    assert all(place[-1] - place[0] < at_most * size for place in places)
    begun = np.array([place[0] for place in places])
    ended = np.array([place[-1] for place in places])
    assert all(((begun <= at) & (at <= ended)).sum() <= at_most for at in range(shards * size))


@given(SEEDS, st.integers(1, 6), st.integers(2, 6))
def test_consecutive_shards_are_spread_over_all_windows(seed: int, turns: int, windows: int) -> None:
    """Of every `windows` consecutive shards, counted from the one that the epoch starts with, each window has one."""
    size, shards = 4, turns * windows
    touched = np.array(_epoch(Order([size] * shards, 3, seed, turns * size))) // size
    window_of = {int(shard): at // (turns * size) for at, shard in enumerate(touched)}
    rotations = [
        [{window_of[(first + turn * windows + i) % shards] for i in range(windows)} for turn in range(turns)]
        for first in range(windows)
    ]
    assert any(all(len(turn) == windows for turn in turns_of) for turns_of in rotations)


@pytest.mark.parametrize(("shards", "window"), [(6, None), (7, 6), (7, 1)])
def test_every_place_is_equally_likely(shards: int, window: int | None) -> None:
    size, seeds = 2, 1000
    found = np.zeros((shards * size, shards * size), np.int64)
    for seed in range(seeds):
        found[np.arange(shards * size), _epoch(Order([size] * shards, shards * size, seed, window))] += 1
    # Rows and columns each add up to the number of seeds.
    assert looks_uniform(found, seeds / len(found), (len(found) - 1) ** 2)


@pytest.mark.parametrize("window", [SHUFFLE_WINDOW, None])
def test_a_batch_of_a_sorted_source_has_nearly_as_many_classes_as_a_random_draw(window: int | None) -> None:
    """A draw of 128 groups has 120.2 of 1,000 classes; groups of eight consecutive shards would have 8 or 9."""
    order = Order(IMAGENET, BATCH, 0, window)
    steps = range(0, order.steps_per_epoch, 25)
    distinct = np.array([len(np.unique(order.batch(step) * CLASSES // order.groups)) for step in steps])
    assert distinct.mean() > 117
    assert np.quantile(distinct, 0.02) >= 110


def test_consecutive_batches_are_not_correlated() -> None:
    order, classes = Order(IMAGENET, BATCH, 3), 20
    found = np.zeros((classes, classes), np.int64)
    for step in range(1000, 1400):
        now, then = (order.batch(at) * classes // order.groups for at in (step, step + 1))
        np.add.at(found, (now, then), 1)
    expected = np.outer(found.sum(1), found.sum(0)) / found.sum()
    assert looks_uniform(found, expected, (classes - 1) ** 2)


def test_memory_does_not_grow_with_the_number_of_groups() -> None:
    tracemalloc.start()
    order = Order([25_000] * 4_000, BATCH, 0)
    batches = [order.batch(step) for step in (0, 1, order.steps_per_epoch - 1, 10 * order.steps_per_epoch)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.groups == 10**8
    assert peak < 4 * 2**20  # an array of the epoch would have 800 MB
    assert all(len(np.unique(batch)) == len(batch) and 0 <= batch.min() <= batch.max() < 10**8 for batch in batches)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(0.05, 3.5)), min_size=1, max_size=4
    ),
    SEEDS,
    WINDOWS,
    st.integers(0, 3),
)
def test_a_group_occurs_as_often_as_the_weight_of_its_artifact(
    artifacts: list[tuple[list[int], float]], seed: int, window: int | None, epoch: int
) -> None:
    sizes = [size for own_sizes, _ in artifacts for size in own_sizes]
    order = Order(sizes, 4, seed, window, [(len(own_sizes), weight) for own_sizes, weight in artifacts])
    if not order.groups:
        return
    times = Counter(_epoch(order, epoch))
    first = 0
    for own_sizes, weight in artifacts:
        found = [times.pop(index, 0) for index in range(first, first + sum(own_sizes))]
        first += sum(own_sizes)
        assert abs(sum(found) - weight * sum(own_sizes)) <= 0.5 + 1e-9
        assert {*found} <= {int(weight), int(weight) + 1}
        # Every shard contributes the same share, up to rounding.
        ends = np.cumsum(own_sizes)
        for size, end in zip(own_sizes, ends, strict=True):
            taken = sum(found[end - size : end])
            assert abs(taken - size * sum(found) / sum(own_sizes)) < 1
    assert not times


def test_a_weight_below_1_takes_another_share_each_epoch_and_all_groups_equally() -> None:
    sizes, epochs = [1, 2, 3, 4] * 4, 600
    order = Order(sizes, 10, 0, weights=[(len(sizes), 0.3)])
    seen = [frozenset(_epoch(order, epoch)) for epoch in range(epochs)]
    assert {len(share) for share in seen} == {order.groups} == {12}
    times = np.bincount([index for share in seen for index in share], minlength=sum(sizes))
    # Draws without replacement vary less than independent ones.
    assert looks_uniform(times, epochs * 0.3, len(times) - 1)
    assert len(set(seen)) > epochs * 0.99


def test_artifacts_are_blended_evenly() -> None:
    """An artifact of a tenth of the groups, in other shards, is a tenth of every window."""
    sizes, weights = [100] * 10 + [10] * 900, [(10, 1.0), (900, 1.0)]
    order = Order(sizes, 100, 0, 1000, weights)
    indices = np.array(_epoch(order)).reshape(10, 1000)
    assert ((indices < 1000).sum(1) == 100).all()


def test_the_order_is_pinned() -> None:
    """With another order, continued runs would read some groups twice and others never."""
    small = Order([3, 4, 5], 5, 7)
    assert small.batch(0).tolist() == [9, 7, 4, 1, 2]
    assert small.batch(4).tolist() == [1, 4, 10, 6, 5]
    large = Order(IMAGENET, 4, 0)
    assert large.batch(12345).tolist() == [581592, 1005235, 281613, 966880]
    assert large.batch(123456789).tolist() == [475013, 754603, 47110, 756835]
    assert Order([3, 4, 5], 5, 7, 4, [(1, 1.5), (2, 0.4)]).batch(0).tolist() == [4, 5, 0, 1, 2]


@given(SIZES, SEEDS, st.integers(1, 9), st.integers(0, 3))
def test_batches_of_an_epoch_cover_it_exactly_once(sizes: list[int], seed: int, batch: int, epoch: int) -> None:
    order = Order(sizes, batch, seed)
    first = epoch * order.steps_per_epoch
    batches = [order.batch(step).tolist() for step in range(first, first + order.steps_per_epoch)]
    assert sorted(index for indices in batches for index in indices) == list(range(sum(sizes)))
    assert all(len(indices) == batch for indices in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch
    assert {order.epoch(step) for step in range(first, first + order.steps_per_epoch)} == {epoch}


@given(SIZES, SEEDS, st.integers(1, 9), st.integers(0, 30), st.integers(0, 10))
def test_any_step_can_be_the_first(sizes: list[int], seed: int, batch: int, start: int, length: int) -> None:
    order = Order(sizes, batch, seed)
    whole = [Order(sizes, batch, seed).batch(step).tolist() for step in range(start + length)]
    assert [order.batch(step).tolist() for step in range(start, start + length)] == whole[start:]
    assert [order.batch_size_of(step) for step in range(start + length)] == [len(indices) for indices in whole]
    assert order.groups_until(start) == sum(len(indices) for indices in whole[:start])


@given(SIZES, SEEDS, st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_ranks_together_take_every_group_exactly_once(
    sizes: list[int], seed: int, batch: int, world: int, accumulate: int, epoch: int
) -> None:
    order = Order(sizes, batch, seed)
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        shares = [
            share
            for rank in range(world)
            for share in Order(sizes, batch, seed).shares(step, Partition(rank, world, accumulate))
        ]
        # In rank order the shares are the batch itself: the same groups at the same positions in every partition.
        assert [index for share in shares for index in share.indices] == order.batch(step).tolist()
        assert [share.first + i for share in shares for i in range(len(share.indices))] == list(
            range(order.batch_size_of(step))
        )
        counts = [len(share.indices) for share in shares]
        assert len(counts) <= world * accumulate
        assert max(counts) - min(counts) <= 1


@given(SIZES, SEEDS, st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 12))
def test_another_world_size_continues_the_same_order(
    sizes: list[int], seed: int, batch: int, world: int, accumulate: int, step: int
) -> None:
    order = Order(sizes, batch, seed)
    parts = [order.batches(0, step, Partition(rank, world, accumulate)) for rank in range(world)]
    before = sorted(index for part in parts for indices in part for index in indices)
    after = [index for indices in order.batches(step, order.steps_per_epoch * 2) for index in indices]
    if step <= order.steps_per_epoch * 2:
        assert sorted(before + after) == sorted(list(range(order.groups)) * 2)


def test_random_streams_are_distinct_and_do_not_depend_on_their_number() -> None:
    seeds = [
        word
        for seed in range(4)
        for purpose in (1, 2, 3, 4)
        for index in range(20)
        for word in stream_seeds(seed, purpose, index, 5)
    ]
    assert len(set(seeds)) == len(seeds)
    assert stream_seeds(3, 2, 7, 9)[:4] == stream_seeds(3, 2, 7, 4)
