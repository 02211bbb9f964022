"""How a run ends early."""

from __future__ import annotations

from storage_schemas import DatamergeError


class Stopped(DatamergeError):
    """A signal ended the run early; its state is saved.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class NotFiniteRun(DatamergeError):
    """A loss or gradient was not finite; the run would come to it again."""


class OverfittedRun(DatamergeError):
    """The attack that a run trains on has lost its meaning; its state is saved, and it would not get better."""
