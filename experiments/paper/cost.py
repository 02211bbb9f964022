"""What the experiment will take, counted and not measured.

    time      FLOPs / (peak × utilisation)
    FLOPs     of a pass, which torch counts on the networks themselves, × passes: those of an attack are counted in
              merge_service/estimate.py, of a training step in trainer/arms.py, of an evaluation in
              datamerge/evaluation/llava/attack.py

It is an upper bound in one respect: attacks on LLaVA leave images alone whose score has fallen far enough, and here
none do. It is a lower bound in another: what a GPU does besides matrix products is left to `utilisation`. Answers,
one token after another, are bound by memory, which adds some percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamerge.encoders import load_encoder
from datamerge.evaluation.llava import captions, vqa
from datamerge.evaluation.llava.attack import MOST_REFERENCES, plan_passes
from datamerge.evaluation.llava.evaluate import FLOAT32, ROOM
from experiments.paper.pipeline import Experiment
from merge_service.estimate import count_passes, group_flops
from storage_schemas.schema.run import BASELINE
from trainer.arms import ARMS

Arithmetic = Literal["half", "float32"]

# ILSVRC2012_img_train.tar, 147,897,477,120 bytes, over its 1,281,167 images.
IMAGE_BYTES = 115_440
# Compressed bytes a value of Σx and scatter together (uint8_moments), measured on photos at N = 10, ε = 2/255.
MOMENT_BYTES = 2.07
# Tokens of a conversation besides the image: system prompt, question and answer, rounded up.
TEXT_TOKENS = 80
PARTS = {"captions": (captions.NEW_TOKENS, ()), "vqa": (vqa.NEW_TOKENS, vqa.TARGETS)}


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
        memory: bytes of the GPU that the stage is refused without.
    """

    name: str
    groups: int
    disk: float
    hours: float | None = None
    memory: float | None = None


def estimate(experiment: Experiment, gpu: Gpu) -> list[Stage]:
    """All stages in the order in which they run."""
    study, config = experiment.study, experiment.merge_config()
    # Its weights need not be here yet.
    architecture = study.data.encoder.partition("@")[0].partition("/")[0]
    encoder = load_encoder(architecture).eval().requires_grad_(False).to("meta")
    passes = count_passes(encoder, encoder.input_shape)

    def stored(members: int, factors: int) -> float:
        """Bytes of all groups; members and factors as if they could not be compressed."""
        values = math.prod(encoder.input_shape) * (MOMENT_BYTES + members + factors)
        return study.groups * (values + FLOAT32 * encoder.embedding_dim)

    hours = gpu.hours(study.groups * group_flops(config, passes), "float32")
    stages = [
        Stage("draw images", study.groups, float(study.groups * IMAGE_BYTES)),
        Stage(f"attack, N = {study.members}", study.groups, stored(study.members, 0), hours),
    ]
    for name, wanted in study.remerge.items():
        stages.append(Stage(f"remerge {name}", study.groups, stored(0, wanted.factors or 0)))
    for name, arm in study.arms.items():
        training = experiment.train_config(name)
        each = ARMS[training.arm].forward_passes(
            training.estimator,
            samples=training.samples,
            members=training.members or study.size(arm.artifact),
            refine_steps=training.refine_steps,
        )
        hours = gpu.hours(study.groups * each * passes.forward, "float32")
        # The trained encoder, and one checkpoint of weights and AdamW's two moments.
        disk = 4.0 * FLOAT32 * sum(parameter.numel() for parameter in encoder.parameters())
        stages.append(Stage(f"train {name}", study.groups, disk, hours))
    return stages + [evaluation(part, experiment, passes.forward, gpu) for part in PARTS]


def evaluation(part: str, experiment: Experiment, encoder: float, gpu: Gpu) -> Stage:
    """All arms and the baseline.

    A pass of an attack is steps + 1 input gradients, and the answer afterwards one more forward pass.

    Args:
        encoder: FLOPs of an image's embedding.
    """
    study, config = experiment.study, experiment.captions_config(BASELINE)
    new_tokens, targets = PARTS[part]
    llava = read_llava(config.llava)
    size = config.image_size or llava.config.vision_config.image_size
    forward = encoder + language_flops(llava, (size // llava.config.vision_config.patch_size) ** 2, new_tokens)
    images, arms = config.sample, len(study.arms) + 1
    flops: dict[Arithmetic, float] = {"half": 0.0, "float32": 0.0}
    for each in plan_passes(MOST_REFERENCES, targets, config.attack):
        flops[each.stage] += (2 * (config.steps + 1) + 1 if each.attacks else 1) * arms * images * forward
    hours = sum(gpu.hours(value, arithmetic) for arithmetic, value in flops.items())
    memory = ROOM * FLOAT32 * sum(parameter.numel() for parameter in llava.parameters())
    return Stage(f"evaluate {part}, {arms} arms", images, 0.0, hours, memory)


def read_llava(name: str) -> Any:
    """The model without weights; the sizes of LLaVA-1.5-7B if it is not on this machine."""
    try:
        config = transformers.LlavaConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        config = transformers.LlavaConfig()
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config).requires_grad_(False)


def language_flops(llava: Any, patches: int, new_tokens: int) -> float:
    """FLOPs of the projector, the language model on an image with its text, and the logits of an answer."""
    config, model = llava.config, llava.model
    image = torch.empty(1, patches, config.vision_config.hidden_size, device="meta")
    tokens = torch.empty(1, patches + TEXT_TOKENS, config.text_config.hidden_size, device="meta")
    # torch does not count attention that is one fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.multi_modal_projector(image)
        model.language_model(inputs_embeds=tokens)
        llava.lm_head(tokens[:, :new_tokens])
    return float(counter.get_total_flops())
