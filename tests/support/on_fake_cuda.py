"""The hot loops on fake tensors that claim to be on a GPU and hold no numbers; see `tests/test_fake_cuda.py`.

    python -m tests.support.on_fake_cuda NO_CARD.so

Code that mixes tensors of GPU and CPU, or calls an operation that PyTorch lacks for GPUs, fails here as on a GPU. The
results and the order of kernels cannot be checked here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path
from typing import Any


def _pretend(library: str) -> None:
    """Load `no_card.cpp` before torch first checks for a GPU."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)


def attacks() -> None:
    """Steps of PGD and APGD in every ball, from starts drawn on the CPU, and the choice of the result."""
    from fractions import Fraction
    from typing import get_args

    import torch

    from datamerge.attacks import APGD, PGD, Ball, Precision, ascend, draw_starts, sample_generators, squared_error
    from datamerge.attacks.apgd import _Search
    from datamerge.attacks.ball import Gradients
    from datamerge.attacks.euclidean import EuclideanBall

    epsilon, clean = Fraction(4, 255), torch.rand(4, 3, 8, 8, device=DEVICE)
    model, target = _there(_encoder()), torch.zeros(4, 6, device=DEVICE)
    for precision in get_args(Precision):
        for kind, settings in (
            (Ball, PGD(epsilon, Fraction(1, 255), 2)),
            (Ball, PGD(epsilon, Fraction(1, 255), 2, grid=False)),
            (EuclideanBall, APGD(epsilon, 2, grid=False, norm="l2")),
        ):
            with REAL():
                (draws,) = draw_starts(settings, (3, 8, 8), sample_generators(0, "group", 4))
            ball = kind.around(clean, epsilon, settings.grid)
            start = ball.placed(draws, epsilon)
            gradients = Gradients(model, target, squared_error, ball.scale, precision)
            points = start.clone()
            ascend(ball, gradients.at, points, 1.0, 2)
            search = _Search(ball, gradients, start, 2.0)
            search.step()
            search.reconsider()
            found = ball.choose(start, gradients.loss_at(start), search.best, gradients.loss_at(points))
            assert found.pixels.device == DEVICE


def arrays() -> None:
    """Arrays that are stored of groups."""
    import numpy as np
    import torch

    from merge_service.stored_arrays import exact_sums, factor_array, grid_levels, moment_arrays
    from storage_schemas import Layout, moment_specs

    members = grid_levels(torch.rand(3, 10, 3, 8, 8, device=DEVICE))
    assert exact_sums(members)[0].device == DEVICE
    specs = tuple(moment_specs("float32", (3, 8, 8), 10, 255))
    layout = Layout(format="zarr", encoding="float32", arrays=specs, groups=3, groups_per_shard=3)
    found = moment_arrays(members, layout)
    found["factors"] = factor_array(members, 2, "sketch", [np.random.default_rng(0)] * 3)
    assert {array.device for array in found.values()} == {DEVICE}


def training() -> None:
    """Losses and gradients of every arm on batches from the CPU, and the update."""
    from itertools import product

    import torch
    from torch import nn

    from datamerge.attacks import Precision
    from datamerge.attacks.arithmetic import fixed_order
    from trainer.arms import ARMS
    from trainer.config import TrainConfig
    from trainer.data.batches import Batch, FactorBatch, ImageBatch, MomentBatch
    from trainer.data.noise import Draws
    from trainer.losses import Cosine, CrossEntropy, SquaredError
    from trainer.run.forward import Forward
    from trainer.run.objective import group_losses
    from trainer.run.refine import Refinement

    mean, clean = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    embeddings, labels = torch.rand(4, 6), torch.zeros(4, dtype=torch.int64)
    precisions: list[Precision] = ["float32", "bfloat16"]
    for precision, (arm, kind) in product(precisions, ARMS.items()):
        encoder = _encoder()
        with REAL():
            model = Forward(encoder, precision=precision)
        parameters = list(_there(encoder).parameters())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for estimator in kind.estimators or (None,):
            for loss, target, weight in (
                (SquaredError(), embeddings, 0.5),
                (Cosine(), embeddings, 0.0),
                (CrossEntropy(), labels, 0.0),
            ):
                if isinstance(loss, Cosine) and estimator is not None and kind.estimators[estimator].curvature:
                    continue
                shared: dict[str, Any] = {"keys": list("abcd"), "target": target, "clean": clean}
                batches: list[Batch] = [
                    MomentBatch(mean=mean, variance=mean, **shared),
                    FactorBatch(mean=mean, factors=torch.rand(4, 2, 3, 8, 8), **shared),
                    ImageBatch(images=mean, counts=[1] * 4, **shared),
                ]
                named = {} if estimator is None else {"estimator": estimator}
                config = TrainConfig(artifact="a", run="r", arm=arm, steps=1, clean_weight=weight, **named)
                batch = next(one for one in batches if _taken(arm, one)).to(DEVICE)
                for refinement in (None, Refinement(2, 1 / 255, 4 / 255)) if kind.images else (None,):
                    with fixed_order(DEVICE):
                        found = group_losses(model, batch, Draws(range(4)), loss, config, refinement)
                        found.loss.sum().backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()


def mixed() -> None:
    """An attack towards targets that were left on the CPU must fail."""
    import torch

    from datamerge.attacks import squared_error
    from datamerge.attacks.ball import Gradients

    clean = torch.rand(4, 3, 8, 8, device=DEVICE)
    try:
        Gradients(_there(_encoder()), torch.zeros(4, 6), squared_error, 1.0, "float32").at(clean)
    except RuntimeError as error:
        assert "cuda:0 and cpu" in str(error), error
    else:
        raise AssertionError("devices were mixed without an error")


def _taken(arm: str, batch: Any) -> bool:
    kinds = {"avg": "MomentBatch", "factors": "FactorBatch"}
    return type(batch).__name__ == kinds.get(arm, "ImageBatch")


def _encoder() -> Any:
    from datamerge.encoders import load_encoder

    with REAL():
        return load_encoder("mlp:3x8x8-16-6", aloud=False)


def _there(module: Any) -> Any:
    """The module with its tensors on the GPU; `Module.to` cannot do this with fake tensors."""
    import torch
    from torch import nn

    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                moved = torch.zeros(tensor.shape, dtype=tensor.dtype, device=DEVICE)
                part._parameters[name] = nn.Parameter(moved, tensor.requires_grad)
        for name, tensor in part._buffers.items():
            if tensor is not None:
                part._buffers[name] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=DEVICE)
    return module


if __name__ == "__main__":
    _pretend(sys.argv[1])
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

    DEVICE, REAL = torch.device("cuda", 0), unset_fake_temporarily
    # Fake tensors cannot be pinned, and torch asks the driver for the rest.
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment,method-assign,misc]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.autocast("cuda", torch.bfloat16):
            assert (torch.ones(2, 2, device=DEVICE) @ torch.ones(2, 2, device=DEVICE)).dtype == torch.bfloat16
        for work in (attacks, arrays, training, mixed):
            work()
            sys.stdout.write(f"{work.__name__} done\n")
