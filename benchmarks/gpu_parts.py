"""The parts of `benchmarks.gpu`, which yield rows as they measure, on a GPU or, in a rehearsal, on the CPU.

The most informative parts come first. The limits of all parts add up to the longest time of `benchmarks.gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu_rows import RATES, Rates, Row


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        rows: "module:function" of the function (rehearse, rates) → rows.
        limit: seconds that it may take.
    """

    rows: str
    limit: float

    def work(self, rehearse: bool, rates: Rates) -> Iterator[Row]:
        """Rows of a part; imports only the modules that it needs."""
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
