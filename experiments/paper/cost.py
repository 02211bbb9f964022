"""Estimate the cost of the experiment by counting; nothing is measured.

    time      FLOPs / (peak × utilisation)
    FLOPs     FLOPs per pass × passes. torch counts the former on the networks; the passes of an attack are counted in
              merge_service/estimate.py, of a training step in trainer/arms.py, of an evaluation in
              datamerge/evaluation/llava/attack.py

The estimate is too high in one respect: attacks on LLaVA stop early for images whose score has fallen far enough,
which is not counted. It is too low in others: work besides matrix products is covered only by `utilisation`, and
answers, generated token by token, are bound by memory bandwidth, which adds some percent.
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
# Compressed bytes per pixel value of Σx and scatter together (uint8_moments), measured on photos, N = 10, ε = 2/255.
MOMENT_BYTES = 2.07
# Text tokens of a conversation, without the image: system prompt, question and answer, rounded up.
TEXT_TOKENS = 80
PARTS = {"captions": (captions.NEW_TOKENS, ()), "vqa": (vqa.NEW_TOKENS, vqa.TARGETS)}


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        peak: peak FLOP/s of dense matrix products, by arithmetic.
        utilisation: fraction of the peak that is reached.
    """

    peak: dict[Arithmetic, float]
    utilisation: float

    def hours(self, flops: float, arithmetic: Arithmetic) -> float:
        """GPU hours for this number of FLOPs."""
        return flops / (self.peak[arithmetic] * self.utilisation) / 3600


@dataclass(frozen=True)
class Stage:
    """One line of the estimate.

    Attributes:
        name: name of the stage.
        groups: number of groups read or written, or of evaluated images.
        disk: bytes written.
        hours: hours of one GPU; None if the stage needs none.
        memory: bytes of GPU memory that the stage requires; None if it checks none.
    """

    name: str
    groups: int
    disk: float
    hours: float | None = None
    memory: float | None = None


def estimate(experiment: Experiment, gpu: Gpu) -> list[Stage]:
    """All stages in the order in which they run."""
    study, config = experiment.study, experiment.merge_config()
    # Only the architecture is needed; the weights may not be on this machine yet.
    architecture = study.data.encoder.partition("@")[0].partition("/")[0]
    encoder = load_encoder(architecture).eval().requires_grad_(False).to("meta")
    passes = count_passes(encoder, encoder.input_shape)

    def stored(members: int, factors: int) -> float:
        """Bytes of all groups, counting members and factors as incompressible."""
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
    """Estimate the evaluation of all arms and the baseline.

    One attack takes steps + 1 input gradients, and the answer afterwards one more forward pass.

    Args:
        part: "captions" or "vqa".
        experiment: the experiment.
        encoder: FLOPs to embed one image.
        gpu: the GPU.
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
    """The model without weights; LLaVA-1.5-7B's sizes if the model is not on this machine."""
    try:
        config = transformers.LlavaConfig.from_pretrained(name, local_files_only=True)
    except OSError:
        config = transformers.LlavaConfig()
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config).requires_grad_(False)


def language_flops(llava: Any, patches: int, new_tokens: int) -> float:
    """FLOPs of the projector, of the language model on an image with its text, and of the logits of an answer."""
    config, model = llava.config, llava.model
    image = torch.empty(1, patches, config.vision_config.hidden_size, device="meta")
    tokens = torch.empty(1, patches + TEXT_TOKENS, config.text_config.hidden_size, device="meta")
    # torch does not count the FLOPs of fused attention kernels.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.multi_modal_projector(image)
        model.language_model(inputs_embeds=tokens)
        llava.lm_head(tokens[:, :new_tokens])
    return float(counter.get_total_flops())
