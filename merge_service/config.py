"""Settings of a merge. One field, one fact; flags, TOML keys and the manifest use the same names."""

from __future__ import annotations

from fractions import Fraction as ExactFraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from adversarial import PGD, ObjectiveName
from console import Fraction, Settings
from storage_schemas.manifest import EncodingName, Format

PositiveInt = Annotated[int, Field(ge=1)]


class MergeConfig(Settings):
    """Everything `datamerge merge` can be told."""

    source: str = Field(description="Folder of images, Parquet file or folder of them; path or fsspec URL.")
    artifact: str = Field(description="Where the artifact goes; path or fsspec URL.")
    grouping: Literal["adversarial", "label"] = Field("adversarial", description="What makes samples a group.")
    members: PositiveInt | None = Field(
        None, description="Samples N in a group: adversarial images of one photo (10), or of a class (all of it)."
    )
    encoder: str | None = Field(None, description="Encoder spec, e.g. open_clip:ViT-B-32/openai; attacked.")
    head: str | None = Field(None, description="Class head for --objective cross_entropy, stored in the artifact.")
    class_names: str | None = Field(None, description="File with one class name a line, for a zero-shot head.")
    objective: ObjectiveName = Field("squared_error", description="Loss the attack maximises.")
    epsilon: Fraction = Field("2/255", description="Radius of the l-inf ball, a fraction of the pixel range.")
    steps: Annotated[int, Field(ge=0)] = Field(10, description="Gradient steps of the attack.")
    step_size: Fraction = Field("1/255", description="Length of a step, a fraction of the pixel range.")
    random_start: bool = Field(True, description="Start at a random point of the ball.")
    grid: bool = Field(True, description="Keep members on the 8-bit grid, so that moments are exact integers.")
    format: Format = Field("zarr", description="Physical form of the shards.")
    encoding: EncodingName | None = Field(None, description="uint8_moments on the grid, float32 off it.")
    groups_per_shard: PositiveInt = Field(256, description="Groups in a shard, the unit of work and of retry.")
    keep_members: bool = Field(False, description="Store the members too, as 8-bit images.")
    keep_clean: bool = Field(False, description="Store the clean image too, as an 8-bit image.")
    shape: str | None = Field(None, description="Pixels CxHxW for label groups; the first image's by default.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of all random choices.")
    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+\-]+$")] | None = Field(
        None, description="Licence for the dataset card, as the Hugging Face Hub spells it, e.g. cc-by-4.0."
    )
    limit: PositiveInt | None = Field(None, description="Use the first LIMIT samples only.")
    image_column: str | None = Field(None, description="Parquet column with the images.")
    label_column: str | None = Field(None, description="Parquet column with the labels.")
    batch_size: PositiveInt = Field(64, description="Images in one forward pass of the attack.")
    threads: PositiveInt = Field(1, description="CPU threads of a worker; more threads, other rounding.")
    # What follows changes how fast the work is done, never what is written.
    workers: PositiveInt | None = Field(None, description="Ray workers; as many as fit by default.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where encoders run.")
    ray_address: str | None = Field(None, description="Ray cluster to use; one is started here by default.")
    max_rejected: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Give up beyond this many unusable samples; 1 % of them, at least 10, by default."
    )

    @model_validator(mode="after")
    def _combinations(self) -> MergeConfig:
        if self.grouping == "adversarial" and self.encoder is None:
            raise ValueError("encoder: adversarial groups need one; add --encoder, e.g. open_clip:ViT-B-32/openai")
        if self.grouping == "adversarial" and self.shape is not None:
            raise ValueError("shape: adversarial groups have the encoder's; leave it out")
        if self.grouping == "label" and self.keep_clean:
            raise ValueError("keep_clean: label groups have no clean image; leave it out")
        if self.grouping == "label" and self.keep_members and self.members is None:
            raise ValueError("keep_members: a whole class is too much to keep; give --members N for smaller groups")
        if not self.grid and self.encoding == "uint8_moments":
            raise ValueError("encoding: uint8_moments needs members on the 8-bit grid; drop --no-grid or use float32")
        if not self.grid and self.keep_members:
            raise ValueError("keep_members: members are stored as 8-bit images; drop --no-grid")
        return self

    @property
    def pgd(self) -> PGD:
        """The attack's settings."""
        return PGD(
            epsilon=ExactFraction(self.epsilon),
            step_size=ExactFraction(self.step_size),
            steps=self.steps,
            random_start=self.random_start,
            on_grid=self.grid,
        )

    @property
    def group_size(self) -> int | None:
        """Members of a group; None for all of a class."""
        return self.members or (10 if self.grouping == "adversarial" else None)

    @property
    def resolved_encoding(self) -> EncodingName:
        return self.encoding or ("uint8_moments" if self.grid else "float32")
