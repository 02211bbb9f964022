"""The global order as a function: a permutation per epoch, cut into batches and shares that cover it exactly once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Order, Partition, epoch_order, stream_seeds

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=20).filter(any)
SEEDS = st.integers(0, 2**32 - 1)


@given(SIZES, SEEDS, st.integers(0, 1000), st.integers(1, 5))
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, epoch: int, window: int) -> None:
    order = epoch_order(sizes, seed, epoch, window).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    assert order == epoch_order(sizes, seed, epoch, window).tolist()


@given(SEEDS, SEEDS, st.integers(0, 50), st.integers(0, 50))
def test_seeds_and_epochs_have_orders_of_their_own(seed: int, other: int, epoch: int, later: int) -> None:
    sizes = [16] * 8
    same = epoch_order(sizes, seed, epoch).tolist() == epoch_order(sizes, other, later).tolist()
    assert same == ((seed, epoch) == (other, later))


@given(SEEDS, st.integers(1, 4), st.integers(1, 20))
def test_only_a_window_of_shards_is_open_at_a_time(seed: int, window: int, shards: int) -> None:
    size = 5
    touched = [int(index) // size for index in epoch_order([size] * shards, seed, 0, window)]
    windows = [set(touched[i : i + window * size]) for i in range(0, len(touched), window * size)]
    assert all(len(shards_of_window) <= window for shards_of_window in windows)
    assert sum(len(shards_of_window) for shards_of_window in windows) == shards


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
def test_ranks_together_do_every_group_exactly_once(
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


def test_random_streams_are_distinct_and_groups_keep_theirs() -> None:
    seeds = [
        word
        for seed in range(4)
        for purpose in (1, 2, 3, 4)
        for index in range(20)
        for word in stream_seeds(seed, purpose, index, 5)
    ]
    assert len(set(seeds)) == len(seeds)
    assert stream_seeds(3, 2, 7, 9)[:4] == stream_seeds(3, 2, 7, 4)
