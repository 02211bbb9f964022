"""Lists of M samples as columns, which take some ten bytes per sample where objects take hundreds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from datamerge.sources.naming import CHUNK, Indices, Listed, Naming
from datamerge.sources.sample import JsonList, Sample
from storage_schemas.display import one_line

NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class Values:
    """A column of texts with few distinct values, such as names of groups.

    Attributes:
        distinct: the distinct texts, in the order of their first occurrence.
        codes: int32 [M], indices into `distinct`; -1 for none.
    """

    distinct: Sequence[str]
    codes: npt.NDArray[np.int32]

    @classmethod
    def of(cls, values: Iterable[str | None]) -> Values:
        """From one value per sample."""
        places: dict[str, int] = {}
        codes = [-1 if value is None else places.setdefault(value, len(places)) for value in values]
        return cls(list(places), np.array(codes, np.int32))

    def part(self, start: int, stop: int) -> list[str | None]:
        """Values of the samples in [start, stop)."""
        return [None if code < 0 else self.distinct[code] for code in self.codes[start:stop].tolist()]

    def take(self, indices: Indices | slice) -> Values:
        """The values at these indices, in this order."""
        return Values(self.distinct, self.codes[indices])


@dataclass(frozen=True, eq=False, repr=False)
class Samples(Sequence[Sample]):
    """A sequence of samples, stored as columns; each `Sample` is made on access.

    Attributes:
        naming: names and keys.
        labels: int32 [M], `NO_LABEL` for none.
        groups: values of the group column, if there is one.
    """

    naming: Naming
    labels: npt.NDArray[np.int32]
    groups: Values | None = None

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """From `Sample` objects."""
        listed = list(samples)
        naming = Listed.of([sample.name for sample in listed], [sample.key for sample in listed])
        groups = None if all(s.group is None for s in listed) else Values.of(s.group for s in listed)
        return cls(naming, label_column([sample.label for sample in listed]), groups)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that grow with M."""
        return self.naming.nbytes + self.labels.nbytes + (0 if self.groups is None else self.groups.codes.nbytes)

    @property
    def names(self) -> list[str]:
        """All names."""
        return self.naming.names(0, len(self))

    @property
    def keys(self) -> list[str]:
        """All keys."""
        return self.naming.keys(0, len(self))

    @property
    def group_values(self) -> list[str | None]:
        """All values of the group column; None for each sample without one."""
        return [None] * len(self) if self.groups is None else self.groups.part(0, len(self))

    def __len__(self) -> int:
        return len(self.labels)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._slice(start, max(start, stop)) if step == 1 else self.take(np.arange(start, stop, step))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        (sample,) = self._slice(place, place + 1)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        for part in self.parts():
            yield from map(Sample, part.keys, part.names, optional_labels(part.labels), part.group_values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Samples):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # equal lists may be stored differently

    def __repr__(self) -> str:
        return one_line(self, "", f"{len(self)} samples")

    def parts(self) -> Iterator[Samples]:
        """The samples in consecutive parts of limited size."""
        return (self[start : start + CHUNK] for start in range(0, len(self), CHUNK))

    def json_of(self, values: Callable[[Samples], Sequence[Any]]) -> JsonList:
        """A JSON list of one value per sample, for `fingerprint`; `values` gives those of a part."""
        return JsonList(map(values, self.parts()))

    def json_of_labels(self) -> JsonList:
        """The labels as a JSON list."""
        return self.json_of(lambda part: optional_labels(part.labels))

    def json_of_groups(self) -> JsonList:
        """The values of the group column as a JSON list."""
        return self.json_of(lambda part: part.group_values)

    def take(self, indices: Indices) -> Samples:
        """The samples at these indices, in this order."""
        groups = None if self.groups is None else self.groups.take(indices)
        return Samples(self.naming.take(indices), self.labels[indices], groups)

    def relabelled(self, rows: Mapping[int, int]) -> Samples:
        """The samples with each label replaced by `rows[label]`."""
        used, back = np.unique(self.labels, return_inverse=True)
        numbers = [NO_LABEL if label == NO_LABEL else rows[label] for label in used.tolist()]
        return replace(self, labels=np.array(numbers, np.int32)[back])

    def used_labels(self) -> list[int]:
        """The distinct labels of the samples, ascending."""
        return [label for label in np.unique(self.labels).tolist() if label != NO_LABEL]

    def _slice(self, start: int, stop: int) -> Samples:
        groups = None if self.groups is None else self.groups.take(slice(start, stop))
        return Samples(self.naming.slice(start, stop), self.labels[start:stop], groups)


def label_column(labels: Sequence[int | None]) -> npt.NDArray[np.int32]:
    """Labels as an int32 column."""
    return np.fromiter((NO_LABEL if label is None else label for label in labels), np.int32, len(labels))


def optional_labels(labels: npt.NDArray[np.int32]) -> list[int | None]:
    """Labels of a column as Python integers or None."""
    return [None if label == NO_LABEL else label for label in labels.tolist()]
