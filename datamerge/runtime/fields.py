"""Fields that several models of settings share: type, limits and help. Each model adds its default."""

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
    Field(ge=1, description="Number of samples to use, drawn evenly over the source by `seed`."),
]
LimitFirst = Annotated[
    int | None,
    Option(unset="all"),
    Field(ge=1, description="Number of samples to use, from the start of the source."),
]
LIMITS = Effect(
    ("limit_first",), lambda settings: settings.limit is None, "`limit` also chooses samples; drop one of the two"
)
SampleSeed = Annotated[int, Field(ge=0, lt=2**32, description="Seed for drawing `sample`.")]
ImageColumn = Annotated[
    str | None,
    Option(metavar="NAME", unset="the only one"),
    Field(description="Column or array with the images."),
]
LabelColumn = Annotated[
    str | None,
    Option(metavar="NAME", unset="label, labels, fine_label, or a similar name"),
    Field(description="Column, array or tar member with the labels; with none, samples have no labels."),
]
Split = Annotated[
    str | None,
    Option(metavar="NAME", unset="the only one"),
    Field(min_length=1, description="Split of a source with several, such as train, train+validation or all."),
]
ExifSetting = Annotated[
    Literal["transpose", "ignore"] | None,
    Option(unset="transpose for Parquet and Arrow, else ignore"),
    Field(description="Whether to apply or ignore the EXIF orientation of images."),
]
Output = Annotated[
    str,
    Option(alias="-o", metavar="FOLDER"),
    Field(min_length=1, description="Folder for the results; a folder with unfinished results is continued."),
]
