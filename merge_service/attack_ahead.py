"""The attack of a shard's groups, batch by batch, with a thread beside it for what needs no encoder.

    beside      inputs 1   inputs 2            records 1, inputs 3     records 2, inputs 4
    attack                 batch 1             batch 2                 batch 3

One thread beside makes all inputs and records, in this order, so that a slow one holds two batches and no more.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

from merge_service.adversarial_groups import Attacker, Batch, Inputs
from merge_service.grouping import Group
from merge_service.reading import Pixels
from storage_schemas import Record, Reject


class AttackAhead:
    """One shard's attack. The inputs of its first batch are made from the start, before `run`.

    Args:
        groups: with their clean images; taken away as they are used.
        beside: the thread beside.
        rejects: gets the groups that cannot be attacked.
    """

    def __init__(
        self,
        attacker: Attacker,
        groups: list[tuple[Group, Pixels]],
        beside: ThreadPoolExecutor,
        rejects: list[Reject],
    ) -> None:
        self._attacker, self._groups, self._beside, self._rejects = attacker, groups, beside, rejects
        self._made: deque[Future[list[Record]]] = deque()
        self._upcoming = self._next()

    def run(self) -> None:
        """Attack all groups; nothing else may use the encoder meanwhile."""
        while self._upcoming is not None:
            batch, inputs = self._upcoming[0], self._upcoming[1].result()
            self._upcoming = self._next()
            self._attack(batch, inputs)

    def records(self) -> list[Record]:
        """All records, in the order of the groups; waits for the last ones. Nothing here holds them afterwards."""
        records: list[Record] = []
        while self._made:
            records += self._made.popleft().result()
        return records

    def _attack(self, batch: Batch, inputs: Inputs) -> None:
        attacked = self._attacker.attack_finite(batch, inputs, self._rejects)
        if attacked is not None:
            self._made.append(self._beside.submit(self._attacker.records, attacked))

    def _next(self) -> tuple[Batch, Future[Inputs]] | None:
        number = self._attacker.groups_per_batch
        batch = self._groups[:number]
        del self._groups[:number]
        return (batch, self._beside.submit(self._attacker.inputs, batch)) if batch else None
