"""Errors that end a training run early."""

from __future__ import annotations

from storage_schemas import DatamergeError


class Stopped(DatamergeError):
    """A signal ended the run early; the run's state is saved.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class NotFiniteRun(DatamergeError):
    """A loss or gradient was not finite; running again would reproduce it."""


class OverfittedRun(DatamergeError):
    """Catastrophic overfitting: the run's own attack no longer raises the loss. The run's state is saved."""
