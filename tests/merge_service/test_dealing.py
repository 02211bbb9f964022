"""Assignment of samples to shards: it is a permutation, and few shards read each block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_service.dealing import Dealing, deal, deal_groups

IntArray = npt.NDArray[np.int64]
BLOCKS = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 60)).map(lambda pair: [pair[0]] * pair[1]),
    # Files of equal blocks and a smaller last one, like Parquet row groups.
    st.tuples(st.integers(2, 30), st.lists(st.integers(1, 100), min_size=1, max_size=12)).map(
        lambda pair: [min(pair[0], rows - first) for rows in pair[1] for first in range(0, rows, pair[0])]
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
)


def reads(order: IntArray, sizes: list[int], per_shard: int) -> IntArray:
    """Number of shards that hold samples of each block, counted sample by sample."""
    block_of = np.repeat(np.arange(len(sizes)), sizes)
    pairs = {(place // per_shard, int(block_of[index])) for place, index in enumerate(order.tolist())}
    return np.bincount([block for _, block in pairs], minlength=len(sizes))


@given(sizes=BLOCKS, per_shard=st.integers(1, 50), seed=st.integers(0, 2**62))
def test_shuffled_blocks_are_a_permutation_and_are_read_no_more_often(
    sizes: list[int], per_shard: int, seed: int
) -> None:
    count = sum(sizes)
    order = deal(count, sizes, per_shard, seed).order
    assert sorted(order.tolist()) == list(range(count))
    before, after = reads(np.arange(count), sizes, per_shard), reads(order, sizes, per_shard)
    shards = -(-count // per_shard)
    if len(set(sizes)) == 1:
        assert (after <= before).all()
    # Blocks of any sizes: each is in at most one shard too many, and each end of a shard splits at most one.
    fewest = -(-np.array(sizes) // per_shard)
    assert (after <= fewest + 1).all()
    assert after.sum() <= len(sizes) + shards - 1


@given(sizes=BLOCKS, per_shard=st.integers(1, 50), seed=st.integers(0, 2**62))
def test_a_reader_that_keeps_one_block_reads_each_block_once(sizes: list[int], per_shard: int, seed: int) -> None:
    """One worker does one shard after the other, and a block that two of them share is read once."""
    count, block_of = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    dealing, kept, loads = deal(count, sizes, per_shard, seed), -1, 0
    for start in range(0, count, per_shard):
        indices = dealing.order[start : start + per_shard]
        read = dealing.as_read(start, start + per_shard)
        assert sorted(read.tolist()) == list(range(len(indices)))
        for index in indices[read].tolist():
            loads += block_of[index] != kept
            kept = block_of[index]
    assert loads == len(sizes)


@given(count=st.integers(1, 500), seed=st.integers(0, 2**62))
def test_samples_without_blocks_are_permuted_and_read_in_source_order(count: int, seed: int) -> None:
    dealing = deal(count, None, 7, seed)
    assert sorted(dealing.order.tolist()) == list(range(count))
    for start in range(0, count, 7):
        indices = dealing.order[start : start + 7]
        assert (np.diff(indices[dealing.as_read(start, start + 7)]) > 0).all()


@pytest.mark.parametrize("sizes", [None, [100] * 10], ids=["one by one", "by blocks"])
def test_seeds_give_different_orders_without_correlation_to_the_source(sizes: list[int] | None) -> None:
    orders = [deal(1000, sizes, 64, seed).order for seed in range(200)]
    assert len({order.tobytes() for order in orders}) == 200
    np.testing.assert_array_equal(orders[0], deal(1000, sizes, 64, 0).order)
    assert np.abs(np.mean([np.corrcoef(order, np.arange(1000))[0, 1] for order in orders])) < (
        0.02 if sizes is None else 0.1
    )
    if sizes is None:
        # The mean place of every sample is the middle, 499.5; the standard deviation of one draw is 1000 / √12.
        places = np.mean([np.argsort(order) for order in orders], axis=0)
        assert np.abs(places - 499.5).max() < 5 * 1000 / np.sqrt(12 * 200)


def test_shards_of_a_source_that_is_sorted_by_class_hold_many_classes() -> None:
    labels = np.repeat(np.arange(1000), 30)
    order = deal(len(labels), None, 256, 0).order
    classes = [len(set(labels[order[start : start + 256]].tolist())) for start in range(0, len(order) - 256, 256)]
    assert min(classes) > 200  # 226 of 1000 are expected, ± 5.5
    # Small row groups: a shard holds several that are not neighbours in the source.
    order = deal(len(labels), [10] * 3000, 256, 0).order
    classes = [len(set(labels[order[start : start + 256]].tolist())) for start in range(0, len(order) - 256, 256)]
    assert min(classes) >= 20  # 9 or 10 in the source's order


def groups_of(labels: IntArray, size: int, seed: int) -> tuple[IntArray, IntArray]:
    """Random groups inside classes, class by class: starts and samples, as `deal_groups` takes them."""
    rng = np.random.default_rng(seed)
    groups = [
        part
        for label in np.unique(labels)
        for part in np.array_split(rng.permutation(np.flatnonzero(labels == label)), (labels == label).sum() // size)
    ]
    return np.cumsum([0, *map(len, groups)]), np.concatenate(groups)


@pytest.mark.parametrize(
    ("sizes", "is_sorted", "dealt"),
    [(None, True, True), ([25] * 40, True, False), ([25] * 40, False, True), ([1000], True, True)],
    ids=["files", "blocks by class", "blocks of all classes", "one block"],
)
def test_groups_are_shuffled_only_if_no_more_blocks_are_read(sizes: Any, is_sorted: bool, dealt: bool) -> None:
    labels = np.repeat(np.arange(10), 100)
    if not is_sorted:
        labels = np.random.default_rng(0).permutation(labels)
    starts, samples = groups_of(labels, 5, 0)
    order = deal_groups(starts, samples, sizes, 20, seed=1)
    assert (order is not None) is dealt
    if order is not None:
        assert sorted(order.tolist()) == list(range(200))
        # Twenty groups from ten classes: 8.8 classes are expected, and one or two in the order of the classes.
        classes = labels[samples[starts[:-1]]][order].reshape(10, 20)
        assert min(len(set(row.tolist())) for row in classes) >= 5


def test_blocks_that_do_not_add_up_to_the_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="9"):
        deal(10, [4, 5], 2, 0)
    assert isinstance(deal(9, [4, 0, 5], 2, 0), Dealing)  # row groups without rows
