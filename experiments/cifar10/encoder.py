"""A small residual network for CIFAR-10, trained from scratch.

It is trained with BatchNorm, which is then folded into the convolutions. So attacks and fine-tuning see a network
without running statistics, whose output for an image does not depend on the rest of the batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from datamerge.encoders import Head, load_encoder, save_encoder
from datamerge.runtime import Progress
from datamerge.sources import decode, open_source
from storage_schemas import Location
from storage_schemas.schema.preprocessing import Preprocessing

SPEC = "python:experiments.cifar10.encoder:cifar_encoder"
SHAPE = (3, 32, 32)
WIDTHS = (32, 64, 128)
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, PADDING = 9, 128, 0.2, 5e-4, 4
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Convolution(nn.Module):
    """3x3 or 1x1 convolution, followed by BatchNorm during pre-training."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=not norm)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.norm(self.conv(features))
        return output


class Block(nn.Module):
    """ReLU(shortcut + two convolutions) (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.first = Convolution(inputs, outputs, 3, stride, norm)
        self.second = Convolution(outputs, outputs, 3, 1, norm)
        self.shortcut = Convolution(inputs, outputs, 1, stride, norm) if stride > 1 else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = (self.shortcut(features) + self.second(self.first(features).relu())).relu()
        return output


class CifarEncoder(nn.Sequential):
    """Pixels [B, 3, 32, 32] in [0, 1] → embeddings [B, 128]; 0.3 M parameters, 10 M multiply-adds."""

    input_shape = SHAPE

    def __init__(self, norm: bool = False) -> None:
        layers: list[nn.Module] = [Convolution(3, WIDTHS[0], 3, 2, norm), nn.ReLU()]
        for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False):
            layers.append(Block(inputs, outputs, 1 if inputs == outputs else 2, norm))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, pixels: Tensor) -> Tensor:
        features = (pixels - 0.5) / 0.25
        for layer in self:
            features = layer(features)
        return features


def cifar_encoder() -> CifarEncoder:
    """Factory for the spec `python:experiments.cifar10.encoder:cifar_encoder`."""
    return CifarEncoder()


def folded(trained: CifarEncoder) -> dict[str, Tensor]:
    """Weights of the equivalent network without BatchNorm (equivalent in eval mode)."""
    state: dict[str, Tensor] = {}
    for name, module in trained.named_modules():
        if isinstance(module, Convolution) and isinstance(module.norm, nn.BatchNorm2d):
            norm = module.norm
            if norm.running_mean is None or norm.running_var is None:
                raise ValueError(f"{name}: BatchNorm keeps no statistics")
            weight, bias = fuse_conv_bn_weights(
                module.conv.weight,
                None,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            state |= {f"{name}.conv.weight": weight.detach(), f"{name}.conv.bias": bias.detach()}
    return state


def pretrain(train: Path, weights: Path, head_file: Path, seed: int) -> None:
    """Train encoder and linear head on clean images, with crops and flips; write both as safetensors."""
    pixels, labels = _load(train)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, head = CifarEncoder(norm=True).train(), nn.Linear(WIDTHS[-1], len(CLASSES))
    for convolution in model.modules():
        if isinstance(convolution, nn.Conv2d):
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=torch.channels_last)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True)
    steps = EPOCHS * -(-len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
    with Progress("pretrain", EPOCHS * len(pixels), "images") as progress:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(pixels), generator=generator).split(BATCH):
                images = _augmented(pixels[batch], generator)
                loss = nn.functional.cross_entropy(head(model(images)), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(len(batch), f"loss {loss.item():.3f}")
    encoder = load_encoder(SPEC)
    encoder.model.load_state_dict(folded(model.eval()))
    save_encoder(encoder, weights)
    Location(head_file.parent).write(head_file.name, Head(head.weight, head.bias, names=CLASSES).to_bytes())


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random crop after padding, and a random flip, of each image; float32 in [0, 1]."""
    padded = nn.functional.pad(pixels.float() / 255, (PADDING,) * 4)
    corners = torch.randint(0, 2 * PADDING + 1, (len(pixels), 2), generator=generator)
    flips = torch.rand(len(pixels), generator=generator) < 0.5
    crops = []
    for image, (top, left), flip in zip(padded, corners.tolist(), flips.tolist(), strict=True):
        crop = image[:, top : top + SHAPE[1], left : left + SHAPE[2]]
        crops.append(crop.flip(-1) if flip else crop)
    return torch.stack(crops)


def _load(source: Path) -> tuple[Tensor, Tensor]:
    listed = open_source(str(source))
    pixels = np.stack([decode(listed.reader.read(sample), Preprocessing(shape=SHAPE)) for sample in listed.samples])
    return torch.from_numpy(pixels), torch.tensor([sample.label for sample in listed.samples])
