"""Settings of a merge. Flags, TOML keys and the manifest use the same names."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from datamerge.attacks import APGD, PGD, ObjectiveName, Precision
from datamerge.runtime import Settings
from datamerge.runtime.fields import LIMITS, ExifSetting, ImageColumn, LabelColumn, Limit, LimitFirst, Split
from datamerge.runtime.options import Option
from datamerge.runtime.settings import Effect
from storage_schemas.schema.factors import FactorKind
from storage_schemas.schema.manifest import EncodingName, Format
from storage_schemas.schema.pixel_length import PixelLength, lost_levels, rounded_level

PositiveInt = Annotated[int, Field(ge=1)]
Grouping = Literal["adversarial", "label", "cluster", "column"]
Targets = Literal["embedding", "label", "both"]
Order = Literal["shuffled", "source"]

DEFAULT_MEMBERS = 10
_ATTACK = ("attack", "epsilon", "steps", "step_size", "random_start", "start_radius", "restarts", "objective")
_KEPT = ("grid", "keep_members", "keep_clean", "factors", "factor_kind")
_LENGTHS = ("epsilon", "step_size", "start_radius")


class MergeConfig(Settings):
    """Settings of `datamerge merge`; a TOML file holds them under the same names."""

    # Users copy settings from training, which once spelled it `bf16`.
    renamed: ClassVar[dict[str, str]] = {"precision=bf16": 'precision = "bfloat16"'}

    effects: ClassVar[tuple[Effect, ...]] = (
        Effect(
            (*_ATTACK, "precision", "compile", "target_encoder"),
            lambda settings: settings.grouping == "adversarial",
            "{settings.grouping} groups are not attacked; drop `{name}`",
        ),
        Effect(
            ("keep_clean",),
            lambda settings: settings.grouping == "adversarial",
            "{settings.grouping} groups have no clean image; drop `{name}`",
        ),
        Effect(
            (*_ATTACK[1:], "precision", "compile", "target_encoder", *_KEPT),
            lambda settings: settings.attack != "none",
            'with `attack="none"` a group is one clean image, which its mean holds; drop `{name}`',
        ),
        Effect(
            ("step_size",),
            lambda settings: settings.attack == "pgd",
            '{settings.attack} chooses its own step sizes; drop `{name}`, or use `attack="pgd"`',
        ),
        Effect(
            ("step_size",), lambda settings: settings.steps > 0, "there are no steps; drop `{name}`, or set `steps`"
        ),
        Effect(
            ("start_radius",),
            lambda settings: settings.random_start,
            "there is no random start to give a radius; drop `{name}`",
        ),
        Effect(
            ("restarts",),
            lambda settings: settings.random_start,
            "without a random start all restarts would be the same; drop `{name}`",
        ),
        Effect(
            ("clusters", "cluster_by"),
            lambda settings: settings.grouping == "cluster",
            '{settings.grouping} groups have no clusters; drop `{name}`, or add `grouping="cluster"`',
        ),
        Effect(
            ("group_column",),
            lambda settings: settings.grouping == "column",
            '{settings.grouping} groups are not read from a column; drop `{name}`, or add `grouping="column"`',
        ),
        Effect(
            ("factor_kind",), lambda settings: settings.factors is not None, "there are no factors; set `factors`"
        ),
        Effect(
            ("class_names",),
            lambda settings: settings.head is not None,
            "class names belong to a head, and none is set; set `head`, or drop `{name}`",
        ),
        Effect(("batch_size",), lambda settings: settings.needs_encoder, "no encoder runs here; drop `{name}`"),
        Effect(
            ("num_gpus",),
            lambda settings: settings.needs_encoder and settings.device != "cpu",
            "no encoder runs on a GPU; drop `{name}`",
        ),
        LIMITS,
    )

    source: Annotated[str, Option(argument=True)] = Field(
        description="Images: a folder, Parquet file, tar, .npz or IDX file, a pattern of tars, or "
        "python:MODULE:FACTORY; path or fsspec URL."
    )
    artifact: Annotated[str, Option(argument=True)] = Field(description="Artifact to write: a folder or fsspec URL.")
    grouping: Grouping = Field("adversarial", description="How samples are grouped.")
    encoder: Annotated[str | None, Option(metavar="SPEC|RUN")] = Field(
        None,
        description="Encoder to attack, such as open_clip:ViT-B-32/openai, or the folder of a finished training run; "
        "without an attack, the encoder whose embeddings become targets or are clustered.",
    )
    target_encoder: Annotated[str | None, Option(metavar="SPEC|RUN", unset="the attacked one")] = Field(
        None, description="Encoder whose embeddings become the targets."
    )
    targets: Annotated[Targets | None, Option(unset="embedding for adversarial groups, label for others")] = Field(
        None, description="Targets that training will use."
    )
    members: Annotated[
        PositiveInt | None, Option(unset=f"adversarial: {DEFAULT_MEMBERS}, not attacked: 1; label: the whole class")
    ] = Field(
        None,
        description="Samples in a group; for cluster groups, of an average cluster.",
    )
    clusters: PositiveInt | None = Field(None, description="k-means clusters of each class, for cluster groups.")
    cluster_by: Literal["pixels", "embedding"] = Field("pixels", description="Space in which k-means runs.")
    group_column: str | None = Field(
        None, description="Column of the source whose values name the groups, for column groups."
    )
    attack: Literal["pgd", "apgd", "none"] = Field(
        "pgd",
        description="Attack that makes the members: PGD, or APGD, which adapts its step size; with none each "
        "group is one clean image.",
    )
    epsilon: PixelLength = Field(
        PixelLength("2/255"), description="Radius of the l-inf ball, a fraction of the pixel range."
    )
    steps: int = Field(10, ge=0, description="Gradient steps of the attack.")
    step_size: PixelLength = Field(
        PixelLength("1/255"), description="Length of a PGD step, a fraction of the pixel range."
    )
    random_start: bool = Field(True, description="Start at a random point of the ball.")
    start_radius: Annotated[PixelLength | None, Option(unset="epsilon")] = Field(
        None, description="Radius of the random start, a fraction of the pixel range."
    )
    restarts: PositiveInt = Field(1, description="Attacks on each member; the strongest is kept.")
    objective: ObjectiveName = Field(
        "squared_error",
        description="Loss that the attack maximises: the squared distance to the clean embedding, or the cross "
        "entropy of the label.",
    )
    head: Annotated[str | None, Option(metavar="FILE|SPEC|RUN")] = Field(
        None,
        description="Class head for cross_entropy, stored in the artifact: a .safetensors file, the classifier of a "
        "timm: spec, the text tower of an open_clip: or hf: spec, or the head of the encoder that a finished run "
        "started from; without one the encoder's outputs are the logits.",
    )
    class_names: Annotated[str | None, Option(metavar="FILE")] = Field(
        None,
        description="Class names of the head: a file with one a line, or `imagenet`; zero-shot heads need them.",
    )
    grid: bool = Field(True, description="Keep members on the 8-bit grid, so that moments are exact integers.")
    precision: Precision = Field("float32", description="Arithmetic of the attack's forward passes.")
    compile: bool = Field(False, description="Run encoders through torch.compile.")
    batch_size: PositiveInt = Field(
        64, description="Images in one forward pass, where each member counts; at least one whole group runs."
    )
    threads: PositiveInt = Field(1, description="CPU threads per worker; another number rounds differently.")
    format: Format = Field("zarr", description="File format of the shards.")
    encoding: Annotated[EncodingName | None, Option(unset="uint8_moments on the 8-bit grid, float32 off it")] = Field(
        None, description="How moments are stored."
    )
    groups_per_shard: PositiveInt = Field(256, description="Groups in a shard, the unit of work and of retry.")
    order: Order = Field(
        "shuffled",
        description="Order of the groups: shuffled by `seed` where that reads no part of the source more often, or "
        "the source's order.",
    )
    keep_members: bool = Field(False, description="Store the members too, as 8-bit images.")
    keep_clean: bool = Field(False, description="Store the clean image too, as an 8-bit image.")
    factors: Annotated[PositiveInt | None, Option(unset="none")] = Field(
        None, description="Factors of each group's covariance to store beside its variance."
    )
    factor_kind: FactorKind = Field(
        "sketch",
        description="Factors are random sketches of the members, or principal directions; sketches become principal "
        "directions where there are `members` - 1 or more of them.",
    )
    shape: Annotated[str | None, Option(metavar="CxHxW", unset="the first image's")] = Field(
        None, description="Shape of the stored pixels where no encoder sets it."
    )
    preprocessing_of: Annotated[str | None, Option(metavar="SPEC|RUN", unset="none")] = Field(
        None, description="Encoder whose preprocessing the images get, where no encoder is attacked or embeds."
    )
    image_size: Annotated[PositiveInt | None, Option(unset="the model's")] = Field(
        None, description="Side of the encoders' input, in pixels."
    )
    resize: bool = Field(True, description="Resize and crop images of other sizes; otherwise they are rejected.")
    split: Split = None
    exif: ExifSetting = None
    image_column: ImageColumn = None
    label_column: LabelColumn = None
    seed: int = Field(0, ge=0, description="Seed of all random choices.")
    license: Annotated[str | None, Option(metavar="ID", unset="other")] = Field(
        None,
        pattern=r"^[A-Za-z0-9.+\-]+$",
        description="Licence for the dataset card, as the Hugging Face Hub spells it, e.g. cc-by-4.0.",
    )
    limit: Limit = None
    limit_first: LimitFirst = None
    # The settings below change the speed, never the bytes written.
    max_workers: Annotated[PositiveInt | None, Option(unset="as many as fit")] = Field(
        None, description="Maximum number of Ray workers."
    )
    num_cpus: Annotated[PositiveInt | None, Option(unset="threads")] = Field(None, description="CPUs per worker.")
    num_gpus: Annotated[float | None, Option(unset="1")] = Field(
        None, gt=0, description="GPUs per worker; with 0.5 two workers share a GPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of the encoders; auto takes GPUs if there are any. Ray assigns them."
    )
    ray_address: Annotated[str | None, Option(metavar="ADDRESS", unset="Ray starts on this machine")] = Field(
        None, description="Ray cluster to use: auto or HOST:PORT."
    )
    max_rejected: Annotated[int | None, Option(unset="1 % of all samples, at least 10")] = Field(
        None, ge=0, description="Number of unusable samples beyond which the merge stops."
    )

    @model_validator(mode="before")
    @classmethod
    def _rounded(cls, values: Any) -> Any:
        """Refuse decimals that are rounded multiples of 1/255."""
        if isinstance(values, dict) and values.get("grid", True):
            for name in _LENGTHS:
                if (problem := rounded_level(values.get(name), radius=name != "step_size")) is not None:
                    raise ValueError(f"{name}: {problem}")
        return values

    @model_validator(mode="after")
    def _combinations(self) -> MergeConfig:
        problems = [*self._grouping_problems(), *self._encoder_problems(), *self._pixel_problems()]
        if self.attacks:
            problems += self._attack_problems()
        for problem in problems:
            raise ValueError(problem)
        return self

    def _grouping_problems(self) -> list[str]:
        problems = []
        if self.grouping == "cluster" and (self.clusters is None) == (self.members is None):
            problems.append(
                "clusters: expected `clusters` of each class or `members` of an average cluster, found "
                f"{'none' if self.clusters is None else 'both'}; set one of them"
            )
        if self.grouping == "column" and self.group_column is None:
            problems.append("group_column: expected the name of a column for column groups, found none")
        if self.grouping == "column" and self.members is not None:
            problems.append("members: the column decides which samples a column group has; drop `members`")
        if self.attack == "none" and self.members not in (None, 1):
            problems.append(
                f'members: expected 1, the clean image, with `attack="none"`, found {self.members}; drop `members`'
            )
        if self.grouping == "label" and self.keep_members and self.members is None:
            problems.append("keep_members: a whole class is too large to store; set `members` for smaller groups")
        if self.grouping in ("cluster", "column") and self.keep_members:
            problems.append(f"keep_members: {self.grouping} groups differ in size; drop `keep_members`")
        return problems

    def _encoder_problems(self) -> list[str]:
        problems = []
        if self.encoder is None and self.needs_encoder:
            use = "to attack" if self.attacks else "for the embeddings"
            problems.append(
                f"encoder: expected an encoder {use}, found none; add a spec such as open_clip:ViT-B-32/openai"
            )
        if self.encoder is not None and not self.needs_encoder:
            groups = "groups of one image" if self.grouping == "adversarial" else f"{self.grouping} groups"
            problems.append(
                f'encoder: {groups} with label targets use none; drop `encoder`, or add `targets="embedding"`'
            )
        if self.encoder is not None and self.shape is not None:
            problems.append("shape: the encoder sets the shape of the pixels; drop `shape`")
        if self.preprocessing_of is not None and (self.encoder is not None or self.shape is not None):
            there = "encoder" if self.encoder is not None else "shape"
            problems.append(f"preprocessing_of: `{there}` sets the pixels; drop `preprocessing_of` or `{there}`")
        if self.image_size is not None and self.encoder is None and self.preprocessing_of is None:
            problems.append("image_size: there is no encoder whose input could have that size; set `shape` instead")
        return problems

    def _pixel_problems(self) -> list[str]:
        problems = []
        if not self.grid and self.encoding == "uint8_moments":
            problems.append(
                'encoding: uint8_moments needs members on the 8-bit grid; use `grid=True` or `encoding="float32"`'
            )
        if self.factors is not None and (self.grouping != "adversarial" or not self.grid):
            problems.append("factors: only adversarial groups on the 8-bit grid have factors; drop `factors`")
        if self.factors is not None and self.factors >= (self.group_size or 1):
            problems.append(
                f"factors: {self.group_size} members span {(self.group_size or 1) - 1} directions, found "
                f"{self.factors}; store fewer, or the members themselves with `keep_members=True`"
            )
        if not self.grid and self.keep_members:
            problems.append("keep_members: members are stored as 8-bit images; use `grid=True`")
        return problems

    def _attack_problems(self) -> list[str]:
        problems = []
        if not self.epsilon:
            problems.append(
                "epsilon: expected more than 0, found 0: all members would be the clean image; set a radius"
            )
        if self.attack == "pgd" and self.steps and not self.step_size:
            problems.append("step_size: expected more than 0, found 0; raise it, or use `steps=0`")
        if self.start_radius is not None and self.start_radius > self.epsilon:
            problems.append(
                f"start_radius: expected at most epsilon, {self.epsilon}, found {self.start_radius}; lower "
                "`start_radius`"
            )
        if self.random_start and (self.start_radius is None or self.start_radius):
            return problems
        name, drop = ("start_radius",) * 2 if self.random_start else ("random_start", "random_start=False")
        # ∇‖f(x) − f(x₀)‖² is 0 at x₀, so no step leaves it.
        if self.objective == "squared_error" and self.target_encoder in (None, self.encoder):
            problems.append(
                f"{name}: the gradient of the squared error is 0 at the clean image, so all members would stay "
                f"there; drop `{drop}`"
            )
        elif not self.steps:
            problems.append(
                f"{name}: without steps and a random start all members would be the clean image; drop `{drop}`, or "
                "set `steps`"
            )
        elif (self.group_size or 1) > 1:
            problems.append(
                f"{name}: without a random start all {self.group_size} members would be the same; drop `{drop}`, or "
                "use `members=1`"
            )
        return problems

    @property
    def attacks(self) -> bool:
        """Whether members are made by an attack."""
        return self.grouping == "adversarial" and self.attack != "none"

    @property
    def needs_encoder(self) -> bool:
        """Whether any step runs an encoder."""
        return (
            self.attacks or self.stores_embedding or (self.grouping == "cluster" and self.cluster_by == "embedding")
        )

    @property
    def resolved_targets(self) -> Targets:
        """`targets`, or its default for this grouping and objective."""
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
        """Settings of the attack, for `datamerge.attacks`."""
        if self.attack == "apgd":
            return APGD(self.epsilon, self.steps, self.random_start, self.grid, self.start_radius)
        return PGD(
            epsilon=self.epsilon,
            step_size=self.step_size,
            steps=self.steps,
            random_start=self.random_start,
            grid=self.grid,
            start_radius=self.start_radius,
        )

    def lost_levels(self) -> list[str]:
        """A sentence for each radius that the 8-bit grid cuts to whole levels."""
        if not self.attacks or not self.grid:
            return []
        radii = (("epsilon", self.epsilon), ("start_radius", self.start_radius))
        found = [(name, lost_levels(radius)) for name, radius in radii if radius is not None]
        return [f"{name}: {lost}; without the grid the attack reaches all of it" for name, lost in found if lost]

    @property
    def group_size(self) -> int | None:
        """Members of a group; None where the data decides the size."""
        if self.grouping == "adversarial" and self.members is None:
            return DEFAULT_MEMBERS if self.attacks else 1
        return self.members

    @property
    def resolved_encoding(self) -> EncodingName:
        """`encoding`, or its default for `grid`."""
        return self.encoding or ("uint8_moments" if self.grid else "float32")

    @property
    def cpus(self) -> int:
        """CPUs that a worker requests from Ray."""
        return self.num_cpus or self.threads
