"""Settings of a merge. One field, one fact; flags, TOML keys and the manifest use the same names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from datamerge.attacks import APGD, PGD, ObjectiveName
from datamerge.runtime import Settings
from storage_schemas.schema.factors import FactorKind
from storage_schemas.schema.manifest import EncodingName, Format
from storage_schemas.schema.pixel_length import PixelLength

PositiveInt = Annotated[int, Field(ge=1)]
Grouping = Literal["adversarial", "label", "cluster", "column"]
Targets = Literal["embedding", "label", "both"]

DEFAULT_MEMBERS = 10


class MergeConfig(Settings):
    """Everything `datamerge merge` can be told."""

    source: str = Field(description="Images: folder, Parquet, tars, .npz, IDX, python:MODULE:FACTORY; path or URL.")
    artifact: str = Field(description="Where the artifact goes; path or fsspec URL.")
    grouping: Grouping = Field("adversarial", description="What makes samples a group.")
    members: PositiveInt | None = Field(
        None,
        description="Samples N in a group: adversarial images of one photo (10), of a class (all), of a cluster.",
    )
    clusters: PositiveInt | None = Field(None, description="k-means clusters of a class.")
    cluster_by: Literal["pixels", "embedding"] = Field("pixels", description="Space in which k-means runs.")
    group_column: str | None = Field(None, description="Column of the source whose values name the groups.")
    targets: Targets | None = Field(
        None, description="What records train towards; embedding for adversarial groups, label for others."
    )
    encoder: str | None = Field(None, description="Encoder spec or folder of a training run; attacked.")
    target_encoder: str | None = Field(None, description="Encoder of the targets, if not the attacked one.")
    head: str | None = Field(None, description="Class head for --objective cross_entropy, stored in the artifact.")
    class_names: str | None = Field(None, description="File with one class name a line, for a zero-shot head.")
    objective: ObjectiveName = Field("squared_error", description="Loss the attack maximises.")
    attack: Literal["pgd", "apgd"] = Field("pgd", description="pgd, or apgd with its own step sizes.")
    epsilon: PixelLength = Field(
        PixelLength("2/255"), description="Radius of the l-inf ball, a fraction of the pixel range."
    )
    steps: Annotated[int, Field(ge=0)] = Field(10, description="Gradient steps of the attack.")
    step_size: PixelLength = Field(
        PixelLength("1/255"), description="Length of a PGD step, a fraction of the pixel range."
    )
    random_start: bool = Field(True, description="Start at a random point of the ball.")
    start_radius: PixelLength | None = Field(None, description="Radius of the random start, if not epsilon.")
    restarts: PositiveInt = Field(1, description="Attacks of each member, of which the strongest is kept.")
    grid: bool = Field(True, description="Keep members on the 8-bit grid, so that moments are exact integers.")
    precision: Literal["float32", "tf32", "bfloat16"] = Field("float32", description="Forward pass of the attack.")
    format: Format = Field("zarr", description="Physical form of the shards.")
    encoding: EncodingName | None = Field(None, description="uint8_moments on the grid, float32 off it.")
    groups_per_shard: PositiveInt = Field(256, description="Groups in a shard, the unit of work and of retry.")
    keep_members: bool = Field(False, description="Store the members too, as 8-bit images.")
    keep_clean: bool = Field(False, description="Store the clean image too, as an 8-bit image.")
    factors: PositiveInt | None = Field(
        None, description="Factors k of each group's covariance to store besides its variance; none by default."
    )
    factor_kind: FactorKind = Field(
        "sketch", description="Random sketches of the members, or principal directions (also with k ≥ N − 1)."
    )
    shape: str | None = Field(None, description="Pixels CxHxW where no encoder says; the first image's by default.")
    resize: bool = Field(True, description="Resize and crop images of other sizes; else they are rejected.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of all random choices.")
    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+\-]+$")] | None = Field(
        None, description="Licence for the dataset card, as the Hugging Face Hub spells it, e.g. cc-by-4.0."
    )
    limit: PositiveInt | None = Field(None, description="Use the first LIMIT samples only.")
    image_column: str | None = Field(None, description="Column with the images.")
    label_column: str | None = Field(None, description="Column with the labels.")
    batch_size: PositiveInt = Field(64, description="Images in one forward pass of the attack; at least one group.")
    threads: PositiveInt = Field(1, description="Threads of an encoder on a CPU; more threads, other rounding.")
    compile: bool = Field(False, description="Run encoders through torch.compile.")
    # What follows changes how fast the work is done, never what is written.
    max_workers: PositiveInt | None = Field(None, description="Ray workers; as many as fit by default.")
    num_cpus: PositiveInt | None = Field(None, description="CPUs of a worker; its threads by default.")
    num_gpus: Annotated[float, Field(gt=0)] | None = Field(None, description="GPUs of a worker, e.g. 0.5; 1.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where encoders run.")
    ray_address: str | None = Field(None, description="Ray cluster to use; one is started here by default.")
    max_rejected: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Give up beyond this many unusable samples; 1 % of them, at least 10, by default."
    )

    @model_validator(mode="after")
    def _combinations(self) -> MergeConfig:
        for problem in (*self._grouping_problems(), *self._encoder_problems(), *self._pixel_problems()):
            raise ValueError(problem)
        return self

    def _grouping_problems(self) -> list[str]:
        problems = []
        if self.grouping == "cluster" and (self.clusters is None) == (self.members is None):
            problems.append(
                "clusters: cluster groups need --clusters K a class, or --members N of an average cluster"
            )
        if self.grouping != "cluster" and self.clusters is not None:
            problems.append(f"clusters: {self.grouping} groups have none; add --grouping cluster")
        if self.grouping != "cluster" and self.cluster_by != "pixels":
            problems.append(f"cluster_by: {self.grouping} groups have no clusters; add --grouping cluster")
        if self.grouping == "column" and self.group_column is None:
            problems.append("group_column: column groups need its name; add --group-column NAME")
        if self.grouping != "column" and self.group_column is not None:
            problems.append(f"group_column: {self.grouping} groups have none; add --grouping column")
        if self.grouping == "column" and self.members is not None:
            problems.append("members: column groups have those that the column gives them; leave it out")
        if self.grouping != "adversarial" and self.keep_clean:
            problems.append(f"keep_clean: {self.grouping} groups have no clean image; leave it out")
        if self.grouping == "label" and self.keep_members and self.members is None:
            problems.append("keep_members: a whole class is too much to keep; give --members N for smaller groups")
        if self.grouping in ("cluster", "column") and self.keep_members:
            problems.append(f"keep_members: {self.grouping} groups differ in size; leave it out")
        return problems

    def _encoder_problems(self) -> list[str]:
        problems = []
        if self.encoder is None and self.grouping == "adversarial":
            problems.append("encoder: adversarial groups need one; add --encoder, e.g. open_clip:ViT-B-32/openai")
        elif self.encoder is None and self.needs_encoder:
            problems.append("encoder: embeddings need one; add --encoder, e.g. open_clip:ViT-B-32/openai")
        if self.encoder is not None and not self.needs_encoder:
            problems.append(
                f"encoder: {self.grouping} groups with label targets use none; drop it, or add --targets embedding"
            )
        if self.encoder is not None and self.shape is not None:
            problems.append("shape: pixels have the encoder's; leave it out")
        if self.target_encoder is not None and self.grouping != "adversarial":
            problems.append(f"target_encoder: {self.grouping} groups are not attacked; give --encoder alone")
        return problems

    def _pixel_problems(self) -> list[str]:
        problems = []
        if not self.random_start and self.start_radius is not None:
            problems.append("start_radius: there is no random start to give a radius; drop --no-random-start")
        if not self.random_start and self.restarts > 1:
            problems.append("restarts: without a random start they would all be the same; drop one of the two")
        if not self.grid and self.encoding == "uint8_moments":
            problems.append("encoding: uint8_moments needs members on the 8-bit grid; drop --no-grid or use float32")
        if self.factors is not None and (self.grouping != "adversarial" or not self.grid):
            problems.append("factors: only adversarial groups on the 8-bit grid have them; drop --factors")
        if self.factors is not None and self.factors >= (self.group_size or 1):
            problems.append(
                f"factors: {self.group_size} members span {(self.group_size or 1) - 1} directions, found "
                f"{self.factors}; store fewer, or the members themselves (--keep-members)"
            )
        if self.factors is None and self.factor_kind != "sketch":
            problems.append("factor_kind: there are no factors; add --factors K")
        if not self.grid and self.keep_members:
            problems.append("keep_members: members are stored as 8-bit images; drop --no-grid")
        return problems

    @property
    def needs_encoder(self) -> bool:
        """Whether any step runs an encoder."""
        return (
            self.grouping == "adversarial"
            or self.stores_embedding
            or (self.grouping == "cluster" and self.cluster_by == "embedding")
        )

    @property
    def resolved_targets(self) -> Targets:
        """What records train towards."""
        if self.targets is not None:
            return self.targets
        if self.grouping != "adversarial":
            return "label"
        return "both" if self.objective == "cross_entropy" else "embedding"

    @property
    def stores_embedding(self) -> bool:
        """Whether records hold an embedding."""
        return self.resolved_targets != "label"

    @property
    def attack_settings(self) -> PGD | APGD:
        """The attack's settings."""
        if self.attack == "apgd":
            return APGD(self.epsilon, self.steps, self.random_start, self.grid, self.start_radius)
        return PGD(
            epsilon=self.epsilon,
            step_size=self.step_size,
            steps=self.steps,
            random_start=self.random_start,
            on_grid=self.grid,
            start_radius=self.start_radius,
        )

    @property
    def group_size(self) -> int | None:
        """Members of a group; None where the data decides."""
        return self.members or (DEFAULT_MEMBERS if self.grouping == "adversarial" else None)

    @property
    def resolved_encoding(self) -> EncodingName:
        """How moments are stored."""
        return self.encoding or ("uint8_moments" if self.grid else "float32")

    @property
    def cpus(self) -> int:
        """CPUs a worker asks Ray for."""
        return self.num_cpus or self.threads
