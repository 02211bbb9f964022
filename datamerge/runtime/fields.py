"""Settings that several commands share: type, limits and help in one place; each model adds its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from datamerge.runtime.options import Option
from datamerge.runtime.settings import Effect

Device = Annotated[str, Field(description="A torch device such as cpu or cuda:1; auto takes a GPU if there is one.")]
Threads = Annotated[int | None, Option(unset="torch's choice"), Field(ge=1, description="CPU threads of torch.")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="Seed of all random choices.")]
Limit = Annotated[
    int | None,
    Option(unset="all"),
    Field(ge=1, description="Draw so many samples by `seed`, evenly over the source."),
]
LimitFirst = Annotated[int | None, Option(unset="all"), Field(ge=1, description="Use the first so many samples.")]
LIMITS = Effect(("limit_first",), lambda own: own.limit is None, "`limit` draws others; drop one of the two")
SampleSeed = Annotated[int, Field(ge=0, lt=2**32, description="Seed of the draw of `sample`.")]
ImageColumn = Annotated[
    str | None,
    Option(metavar="NAME", unset="the only one"),
    Field(description="Column or array of the source with the images."),
]
LabelColumn = Annotated[
    str | None,
    Option(metavar="NAME", unset="label, labels, fine_label, or the one that is called like labels"),
    Field(description="Column, array or tar member with the labels; none: without labels."),
]
Split = Annotated[
    str | None,
    Option(metavar="NAME", unset="the only one"),
    Field(min_length=1, description="Split of the source, where it has several: train, train+validation, or all."),
]
ExifSetting = Annotated[
    Literal["transpose", "ignore"] | None,
    Option(unset="transpose for Parquet and Arrow, else ignore"),
    Field(description="Whether the orientation in images' EXIF data is applied."),
]
Output = Annotated[
    str,
    Option(alias="-o", metavar="FOLDER"),
    Field(min_length=1, description="Folder of the results; the same one again continues."),
]
