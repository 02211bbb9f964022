"""The settings in settings.toml; its tables merge, train and evaluate hold settings of those commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from datamerge.runtime import Settings, load_settings
from storage_schemas.schema.factors import FactorKind

MEMBERS = "members"
COLUMNS = ("COCO clean", "COCO adv.", "VQAv2 clean", "VQAv2 adv.")

Count = Annotated[int, Field(ge=1)]


class Data(Settings):
    """Data and models, as paths relative to the folder --data.

    Attributes:
        images: folder of ImageNet's training images, with one sub-folder per class.
        encoder: spec of the CLIP encoder; a file after `@` is relative to the folder too.
        llava: folder, or name on the Hugging Face hub.
        coco_captions, vqa_questions, vqa_annotations: the official JSON files.
        coco_images, vqa_images: folders of the images that these files name.
    """

    images: str
    encoder: str
    llava: str
    coco_captions: str
    coco_images: str
    vqa_questions: str
    vqa_annotations: str
    vqa_images: str

    def below(self, folder: Path) -> Data:
        """The same with absolute paths; an encoder without a file and a LLaVA that is not a folder stay as named."""
        root = folder.expanduser().absolute()
        spec, at, weights = self.encoder.partition("@")
        paths = {name: str(root / value) for name, value in self.model_dump().items() if name != "encoder"}
        paths["llava"] = paths["llava"] if Path(paths["llava"]).is_dir() else self.llava
        return Data(encoder=f"{spec}@{root / weights}" if at else self.encoder, **paths)


class Draw(Settings):
    """Settings for drawing images at random."""

    seed: Annotated[int, Field(ge=0)]


class Remerged(Settings):
    """An artifact made from the attacked members: from the first `members` of them, or with factors of all."""

    members: Count | None = None
    factors: Count | None = None
    factor_kind: FactorKind = "sketch"


class Arm(Settings):
    """An artifact, and the training arm that uses it."""

    artifact: str
    arm: str
    members: Count | None = None


class Study(Settings):
    """All settings of the file."""

    data: Data
    draw: Draw
    merge: dict[str, Any]
    remerge: dict[str, Remerged]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    arms: dict[str, Arm]
    published: dict[str, list[float]]

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for table, names in {
            "merge": ("members", "steps", "batch_size"),
            "train": ("steps", "batch_size"),
            "evaluate": ("sample", "steps"),
        }.items():
            for name in names:
                value = getattr(self, table).get(name)
                if not isinstance(value, int) or value < 1:
                    raise ValueError(f"{table}.{name}: expected a whole number above 0, found {value!r}")
        for name, arm in self.arms.items():
            if not re.fullmatch(r"[A-Za-z0-9.\-]+", name):
                raise ValueError(f"arms: expected names of letters, digits, points and hyphens, found {name!r}")
            if arm.artifact not in (MEMBERS, *self.remerge):
                known = ", ".join((MEMBERS, *self.remerge))
                raise ValueError(f"arms.{name}.artifact: expected one of {known}, found {arm.artifact!r}")
        wrong = [name for name, row in self.published.items() if len(row) != len(COLUMNS)]
        if wrong:
            raise ValueError(f"published.{wrong[0]}: expected the {len(COLUMNS)} numbers {', '.join(COLUMNS)}")
        return self

    @property
    def groups(self) -> int:
        """Number of images to attack: as many groups as training takes, so that it sees none twice."""
        return int(self.train["steps"]) * int(self.train["batch_size"])

    @property
    def members(self) -> int:
        """N, the number of attacked members per group."""
        return int(self.merge["members"])

    def size(self, artifact: str) -> int:
        """Number of members per group of an artifact."""
        merged = self.remerge.get(artifact)
        return merged.members or self.members if merged else self.members


def read_study(file: Path) -> Study:
    """Read the settings from a file.

    Raises:
        ConfigError: the file cannot be read or has invalid settings; the message names every problem.
    """
    return load_settings(Study, str(file), {})
