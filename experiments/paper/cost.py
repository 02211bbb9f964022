"""What the experiment will take, counted and not measured: FLOPs, bytes and memory of every stage.

    FLOPs of a transformer      2·T·W + 4·T²·d·L       W = L·(4d² + m·d·h) weights in matrices, T tokens
    time                        FLOPs / (peak × utilisation)
    passes, in forward passes   input gradient 2, plain training step 3                               (PAPER §4)
    memory, input gradients     4·P + activations      float32 weights
    memory, training            16·P + activations     weights, gradients and AdamW's two moments

d is the width, h the hidden width, L the layers, m = 2 matrices of a GELU block (ViT) or 3 of a SwiGLU block (LLaMA,
Touvron et al. 2023). Lookups, normalisation and softmax are not counted. Activations are counted as in Korthikanti et
al. 2022 (arXiv 2205.05198, §4.1), with fused attention and without dropout, in values per token and layer:

    for input gradients     6d + h (GELU), 6d + 3h (SwiGLU)     inputs of two norms, q, k, v, attention's output; MLP
    for training            8d + 2h                             also the inputs of all matrix products

It is an upper bound in one respect: attacks on LLaVA leave images alone whose score has fallen far enough, and here
none do. It is a lower bound in another: what a GPU does besides matrix products is left to `utilisation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from experiments.paper.settings import Arm, Language, Study, Vision

Arithmetic = Literal["half", "float32"]

FLOAT32 = 4
# float32 weights, gradients, and AdamW's first and second moments.
TRAINED = 4 * FLOAT32
# Plain steps of the paper's estimator, one input gradient that is differentiated again: trainer/README.md.
GAUSS_NEWTON = 2.3
# `datamerge evaluate` refuses a GPU with less than this many times the float32 weights.
ROOM = 1.25
# ILSVRC2012_img_train.tar, 147,897,477,120 bytes, over its 1,281,167 images.
IMAGE_BYTES = 115_440
# Compressed bytes a value of Σx and scatter together (uint8_moments), measured on photos at N = 10, ε = 2/255.
MOMENT_BYTES = 2.07
# Passes of FARE's ensemble (evaluation/README.md): references in half precision; then in float32.
REFERENCES = 5
FLOAT32_PASSES = {"captions": 1, "vqa": 3}
NEW_TOKENS = {"captions": 20, "vqa": 5}


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        peak: FLOP/s of dense matrix products.
        utilisation: the share of it that is reached.
    """

    peak: dict[Arithmetic, float]
    utilisation: float

    def hours(self, flops: float, arithmetic: Arithmetic) -> float:
        """Time for so much work."""
        return flops / (self.peak[arithmetic] * self.utilisation) / 3600


@dataclass(frozen=True)
class Stage:
    """One line of the estimate.

    Attributes:
        name: what is done.
        groups: groups that are read or made, or images that are asked about.
        disk: bytes written.
        hours: of one GPU; None where none is needed.
        memory: bytes of the GPU; None where none is needed.
    """

    name: str
    groups: int
    disk: float
    hours: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Blocks:
    """The blocks of a transformer; see the module's formulas."""

    layers: int
    width: int
    hidden: int
    matrices: Literal[2, 3]

    @property
    def weights(self) -> int:
        """W."""
        return self.layers * (4 * self.width**2 + self.matrices * self.width * self.hidden)

    def forward(self, tokens: int) -> float:
        """FLOPs of a forward pass."""
        return 2.0 * tokens * self.weights + 4.0 * tokens**2 * self.width * self.layers

    def kept(self, tokens: int, training: bool) -> float:
        """Bytes of float32 activations that a backward pass needs."""
        mlp = self.hidden if self.matrices == 2 else 3 * self.hidden
        values = 8 * self.width + 2 * self.hidden if training else 6 * self.width + mlp
        return float(FLOAT32) * self.layers * tokens * values


class ClipEncoder:
    """f: pixels → embedding, and its share of LLaVA, which drops the last block and the projection."""

    def __init__(self, sizes: Vision) -> None:
        self.sizes = sizes
        self.blocks = Blocks(sizes.layers, sizes.width, sizes.hidden, 2)
        self.in_llava = Blocks(sizes.layers - 1, sizes.width, sizes.hidden, 2)
        self.patches = (sizes.image_size // sizes.patch) ** 2
        self.tokens = self.patches + 1
        self.patch_weights = 3 * sizes.patch**2 * sizes.width
        self.values = 3 * sizes.image_size**2

    @property
    def parameters(self) -> int:
        """Weights in matrices and position embeddings; norms and biases, under 0.1 %, left out."""
        sizes = self.sizes
        return self.blocks.weights + self.patch_weights + (self.tokens + sizes.embedding) * sizes.width

    @property
    def forward(self) -> float:
        """FLOPs of one image's embedding."""
        project = 2.0 * self.sizes.width * self.sizes.embedding
        return self.blocks.forward(self.tokens) + 2.0 * self.patches * self.patch_weights + project

    def attention_matrices(self) -> float:
        """Bytes of float32 attention matrices, which the math kernel keeps."""
        return float(FLOAT32) * self.sizes.layers * self.sizes.heads * self.tokens**2


class Llava:
    """The encoder's patches, two projector layers, and a language model."""

    def __init__(self, vision: Vision, language: Language) -> None:
        self._encoder, self._sizes = ClipEncoder(vision), language
        self._blocks = Blocks(language.layers, language.width, language.hidden, 3)
        self._projector = vision.width * language.width + language.width**2
        self.tokens = self._encoder.patches + language.text

    @property
    def parameters(self) -> int:
        """Weights in matrices, of which the vocabulary has two."""
        vocabulary = 2 * self._sizes.vocabulary * self._sizes.width
        return self._blocks.weights + vocabulary + self._projector + self._encoder.parameters

    def forward(self, new_tokens: int) -> float:
        """FLOPs of one image with its text and the logits of an answer."""
        encoder = self._encoder
        vision = encoder.in_llava.forward(encoder.tokens) + 2.0 * encoder.patches * encoder.patch_weights
        logits = 2.0 * new_tokens * self._sizes.vocabulary * self._sizes.width
        return vision + 2.0 * encoder.patches * self._projector + self._blocks.forward(self.tokens) + logits

    @property
    def memory(self) -> float:
        """Bytes of an attack on one image in float32, and no less than `datamerge evaluate` asks for."""
        weights = float(FLOAT32) * self.parameters
        kept = self._encoder.in_llava.kept(self._encoder.tokens, False) + self._blocks.kept(self.tokens, False)
        return max(weights + kept, ROOM * weights)


def estimate(study: Study, gpu: Gpu) -> list[Stage]:
    """All stages in the order in which they run."""
    encoder = ClipEncoder(study.vision)
    stages = [Stage("draw images", study.groups, float(study.groups * IMAGE_BYTES)), attack(study, encoder, gpu)]
    for name, wanted in study.remerge.items():
        held = study.groups * group_bytes(study, encoder, 0, wanted.factors or 0)
        stages.append(Stage(f"remerge {name}", study.groups, held))
    stages += [training(name, arm, study, encoder, gpu) for name, arm in study.arms.items()]
    stages += [evaluation(part, study, gpu) for part in FLOAT32_PASSES]
    return stages


def group_bytes(study: Study, encoder: ClipEncoder, members: int, factors: int) -> float:
    """Stored bytes of a group; members and factors as if they could not be compressed."""
    return encoder.values * (MOMENT_BYTES + members + factors) + float(FLOAT32) * study.vision.embedding


def attack(study: Study, encoder: ClipEncoder, gpu: Gpu) -> Stage:
    """The clean embedding, and for each member `steps` input gradients and the loss of the result."""
    passes = 1 + study.members * (2 * int(study.merge["steps"]) + 1)
    kept = int(study.merge["batch_size"]) * encoder.blocks.kept(encoder.tokens, False)
    return Stage(
        f"attack, N = {study.members}",
        study.groups,
        study.groups * group_bytes(study, encoder, study.members, 0),
        gpu.hours(study.groups * passes * encoder.forward, "float32"),
        float(FLOAT32) * encoder.parameters + kept,
    )


def training(name: str, arm: Arm, study: Study, encoder: ClipEncoder, gpu: Gpu) -> Stage:
    """Steps of one arm; disk is the trained encoder and one checkpoint of weights and moments."""
    images = (arm.members or study.size(arm.artifact)) if arm.arm == "ind" else 1
    plain_steps = GAUSS_NEWTON if arm.arm == "avg" else float(images)
    batch = int(study.train["batch_size"])
    kept = encoder.blocks.kept(encoder.tokens, True)
    if arm.arm == "avg":
        # The graph of the input gradient is kept besides that of the forward pass, by the math kernel.
        kept = 2 * (kept + encoder.attention_matrices())
    return Stage(
        f"train {name}",
        study.groups,
        4.0 * FLOAT32 * encoder.parameters,
        gpu.hours(3 * plain_steps * study.groups * encoder.forward, "float32"),
        float(TRAINED) * encoder.parameters + batch * images * kept,
    )


def evaluation(part: str, study: Study, gpu: Gpu) -> Stage:
    """All arms and the baseline: each attack pass is steps + 1 input gradients, each answer one more forward pass.

    Answers are counted by FLOPs; token by token they are bound by memory, which adds some percent.
    """
    llava = Llava(study.vision, study.language)
    arms, images = len(study.arms) + 1, int(study.evaluate["sample"])
    forward = llava.forward(NEW_TOKENS[part])
    attacked = 2 * (int(study.evaluate["steps"]) + 1) + 1
    half = arms * images * (1 + REFERENCES * attacked) * forward
    single = arms * images * FLOAT32_PASSES[part] * attacked * forward
    hours = gpu.hours(half, "half") + gpu.hours(single, "float32")
    return Stage(f"evaluate {part}, {arms} arms", images, 0.0, hours, llava.memory)
