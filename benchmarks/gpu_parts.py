"""The parts of `benchmarks.gpu`: each yields rows as it measures, on a GPU or, in a rehearsal, tiny on the CPU.

What tells most comes first. The limits add up to what `benchmarks.gpu` takes at most, so every part has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu_rows import RATES, Rates, Row


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        rows: name of the function that yields them, given whether this is a rehearsal, and the rates.
        limit: seconds that it may take.
    """

    rows: str
    limit: float

    def work(self, rehearse: bool, rates: Rates) -> Iterator[Row]:
        """Its rows; imports what only this part needs."""
        module, _, name = self.rows.partition(":")
        function: Callable[[bool, Rates], Iterator[Row]] = getattr(import_module(f"benchmarks.{module}"), name)
        return function(rehearse, rates)


PARTS: dict[str, Part] = {
    RATES: Part("gpu_layers:rate_rows", 15),
    "attack": Part("gpu_attack:attack_rows", 35),
    "train": Part("gpu_training:train_rows", 45),
    "merge": Part("gpu_merge:merge_rows", 45),
    "feed": Part("gpu_training:feed_rows", 30),
    "exchange": Part("gpu_exchange:exchange_rows", 10),
    "launches": Part("gpu_attack:launch_rows", 25),
    "compiled": Part("gpu_training:compiled_rows", 35),
    "layers": Part("gpu_layers:layer_rows", 15),
    "llava": Part("gpu_llava:llava_rows", 25),
}
