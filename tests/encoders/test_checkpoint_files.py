"""Weight files as the libraries write them: their contents decide how they are read, and no code in them is run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from datamerge.encoders import Encoder, load_encoder, save_encoder
from datamerge.encoders.checkpoints import read_state_dict, recorded_preprocessing
from storage_schemas import ConfigError
from tests.support.refusals import refused
from tests.support.small_clips import NAME, add_models, openai_archive, scrambled, small_clip

SPEC = f"open_clip:{NAME}"
QUICK = f"{NAME}-quickgelu"


@pytest.fixture(scope="module", autouse=True)
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small CLIP that the weight files belong to."""
    add_models(tmp_path_factory.mktemp("configs"), {NAME: {}, QUICK: {"quick_gelu": True}, "small-clip-alone": {}})
    return small_clip()


@pytest.fixture(scope="module")
def visual(clip: Any) -> dict[str, Tensor]:
    return dict(clip.visual.state_dict())


def _pixels() -> Tensor:
    return torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def _assert_loads(file: Path, network: nn.Module, spec: str = SPEC) -> Encoder:
    """Assert that the file loads exactly this network; returns the encoder."""
    encoder = load_encoder(f"{spec}@{file}")
    for name, tensor in network.state_dict().items():
        found = encoder.model.state_dict()[name]
        assert found.dtype == torch.float32 or not found.is_floating_point()
        assert torch.equal(found, tensor.to(found.dtype)), name
    with torch.no_grad():
        assert torch.equal(encoder.model(_pixels()), network.float()(_pixels()))
    return encoder


@pytest.mark.parametrize("name", ["ViT.pt", "ViT.bin"])
def test_torchscript_archives_of_openai(tmp_path: Path, name: str) -> None:
    """Half-precision weights; open_clip's own loader gives the same embeddings."""
    import open_clip

    file = tmp_path / name
    openai_archive(small_clip(QUICK), file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = open_clip.load_openai_model(str(file), device="cpu")
    _assert_loads(file, theirs.visual, f"open_clip:{QUICK}")
    # The activation is recognised, although no name or shape of a tensor shows it.
    assert _assert_loads(file, theirs.visual).spec == f"open_clip:{QUICK}@{file}"
    with refused(ConfigError, "encoder", "open_clip:small-clip-alone", file, "QuickGELU", "-quickgelu"):
        load_encoder(f"open_clip:small-clip-alone@{file}")
    state = dict(theirs.state_dict()) | {"input_resolution": torch.tensor(32), "vocab_size": torch.tensor(64)}
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "state.pt")
    _assert_loads(tmp_path / "state.pt", theirs.visual.half(), f"open_clip:{QUICK}")


def test_training_checkpoints_of_open_clip(tmp_path: Path, clip: Any) -> None:
    """epoch_N.pt as open_clip's training writes it, with DistributedDataParallel's names and NumPy scalars."""
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    clip(torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, dtype=torch.long))[0].sum().backward()
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    optimizer.step()
    clip.load_state_dict(state)
    for group in optimizer.param_groups:
        # open_clip's schedulers compute the rate with NumPy.
        group["lr"] = 0.5 * (1 + np.cos(np.pi * 3 / 10)) * 1e-3
    saved = {
        "epoch": np.int64(3),
        "name": "run",
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "random": np.random.default_rng(0).integers(9, size=3),
        "scaler": {"scale": np.float32(65536), "growth_tracker": 0},
    }
    for zipped in (True, False):
        torch.save(saved, tmp_path / "epoch_3.pt", _use_new_zipfile_serialization=zipped)
        _assert_loads(tmp_path / "epoch_3.pt", clip.visual)
    # NumPy 1 has another module name.
    data = io.BytesIO()
    torch.save(saved, data, _use_new_zipfile_serialization=False)
    (tmp_path / "old.pt").write_bytes(data.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    _assert_loads(tmp_path / "old.pt", clip.visual)


WRAPPERS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1), "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": np.float64(0.5)},
    "module": lambda state: {"module": state, "global_steps": 9},
    "ema": lambda state: {"ema": state},
    "twice": lambda state: {"checkpoint": {"model": state}},
    "lightning": lambda state: {
        "epoch": 1,
        "global_step": 7,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    },
}
PREFIXES = [
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "visual.",
    "module.visual.",
    "_orig_mod.visual.",
    "visual._orig_mod.",
    "model.visual.",
    "module._orig_mod.model.visual.",
    "encoder.",
    "image_encoder.",
    "clip_model.visual.",
    "model.vision_encoder_orig.",
]


def _write(state: dict[str, Tensor], file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        torch.save(state, file)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_prefixes_in_every_container(tmp_path: Path, visual: dict[str, Tensor], clip: Any, suffix: str) -> None:
    """The file also has the text tower, whose layers have the same names."""
    text = {name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("visual.")}
    file = tmp_path / f"weights{suffix}"
    for prefix in PREFIXES:
        state = {f"{prefix}{name}": tensor for name, tensor in visual.items()}
        if "visual." in prefix:
            state |= {f"{prefix.replace('visual.', '')}{name}": tensor for name, tensor in text.items()}
        _write(state, file)
        _assert_loads(file, clip.visual)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_state_dicts_in_wrappers_of_training_programs(
    tmp_path: Path, visual: dict[str, Tensor], clip: Any, wrapper: str
) -> None:
    for prefix in ("", "module.", "_orig_mod.visual."):
        torch.save(
            WRAPPERS[wrapper]({f"{prefix}{name}": tensor for name, tensor in visual.items()}), tmp_path / "w.ckpt"
        )
        _assert_loads(tmp_path / "w.ckpt", clip.visual)


def test_the_format_is_recognised_by_the_content_not_the_name(
    tmp_path: Path, visual: dict[str, Tensor], clip: Any
) -> None:
    save_file(visual, tmp_path / "w.pt")
    torch.save(visual, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        _assert_loads(tmp_path / name, clip.visual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_weights_of_other_precisions(tmp_path: Path, clip: Any, dtype: torch.dtype, name: str) -> None:
    network = deepcopy(clip.visual).to(dtype)
    _write(network.state_dict(), tmp_path / name)
    _assert_loads(tmp_path / name, network)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_files(tmp_path: Path, clip: Any, visual: dict[str, Tensor], kind: str) -> None:
    """Shards of huggingface_hub are read; missing shards, missing tensors and paths elsewhere are refused."""
    from huggingface_hub import save_torch_state_dict

    safe = kind == "safetensors"
    metadata = {"preprocessing": json.dumps(load_encoder(SPEC).preprocessing.record())} if safe else None
    state = {f"visual.{name}": tensor for name, tensor in visual.items()}
    save_torch_state_dict(state, tmp_path, max_shard_size=600_000, safe_serialization=safe, metadata=metadata)
    index = next(tmp_path.glob("*.index.json"))
    shards = sorted(path for path in tmp_path.iterdir() if path != index)
    assert len(shards) > 1
    encoder = _assert_loads(index, clip.visual)
    assert recorded_preprocessing(index) == (encoder.preprocessing if safe else None)
    with refused(ConfigError, "encoder", shards[0], ".index.json"):
        load_encoder(f"{SPEC}@{shards[0]}")
    shards[1].rename(tmp_path / "away")
    with refused(ConfigError, "encoder", index, repr(shards[1].name)):
        load_encoder(f"{SPEC}@{index}")
    shutil.copy(shards[0], shards[1])
    with refused(ConfigError, "encoder", shards[1], index.name):
        load_encoder(f"{SPEC}@{index}")
    for listed in ("../w.safetensors", "/w.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {"visual.proj": listed}}))
        with refused(ConfigError, "encoder", index, repr(listed)):
            load_encoder(f"{SPEC}@{index}")


def test_saved_encoders_keep_weights_and_preprocessing(tmp_path: Path, clip: Any) -> None:
    encoder = load_encoder(SPEC)
    encoder.model.load_state_dict(clip.visual.state_dict())
    save_encoder(encoder, tmp_path / "w.safetensors")
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "w.safetensors", tmp_path / "moved" / "w.pt")
    again = _assert_loads(tmp_path / "moved" / "w.pt", clip.visual)
    assert again.preprocessing == encoder.preprocessing == recorded_preprocessing(tmp_path / "moved" / "w.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "w", {"preprocessing": "{"})
    with refused(ConfigError, "encoder", tmp_path / "w", "JSON"):
        load_encoder(f"{SPEC}@{tmp_path / 'w'}")


def test_prefixes_of_all_names_are_removed(tmp_path: Path, visual: dict[str, Tensor]) -> None:
    """Classifiers are read in this way."""
    torch.save(
        {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in visual.items()}}, tmp_path / "w"
    )
    assert read_state_dict(tmp_path / "w").keys() == visual.keys()


class Exploit:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


class ScriptedExploit(nn.Module):
    """Writes a file when TorchScript loads it."""

    def __init__(self, trap: str) -> None:
        super().__init__()
        self.trap = trap
        self.mapped = torch.zeros(16)

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.trap, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.trap = state[0]
        self.training = state[1]
        self.mapped = torch.from_file(state[0], True, 16)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "model", "TorchScript"])
def test_code_is_refused_and_not_run(tmp_path: Path, visual: dict[str, Tensor], clip: Any, how: str) -> None:
    trap, file = tmp_path / "trap", tmp_path / "w.pt"
    saved = {**visual, "evil": Exploit(trap)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(saved))
    elif how == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(ScriptedExploit(str(trap))).save(str(file))
            torch.jit.load(str(file))
        assert trap.exists()  # the payload works
        trap.unlink()
    else:
        torch.save(clip if how == "model" else saved, file, _use_new_zipfile_serialization=how != "legacy")
    fact = {"model": "open_clip.model.CLIP", "TorchScript": "__setstate__", "pickle": "pickle"}.get(how, ".mkdir")
    with refused(ConfigError, "encoder", file, fact, "state_dict()") as caught:
        load_encoder(f"{SPEC}@{file}")
    assert not trap.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice, which would run the code


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


NOT_WEIGHTS: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "empty": (lambda torch_file, safe: b"", "empty"),
    "half of a torch file": (lambda torch_file, safe: _half(torch_file), "truncated"),
    "half of a safetensors file": (lambda torch_file, safe: _half(safe), "truncated"),
    "the first bytes": (lambda torch_file, safe: safe[:20], "truncated"),
    "Git LFS": (
        lambda torch_file, safe: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        "git lfs pull",
    ),
    "a page": (lambda torch_file, safe: b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "a configuration": (lambda torch_file, safe: b'{"hidden_size": 3}', "weight_map"),
    "half an index": (lambda torch_file, safe: b'{"weight_map": {"a', "truncated"),
    "JSON of another kind": (lambda torch_file, safe: b'{"weight_map": []}', "weight_map"),
    "text": (lambda torch_file, safe: b"Model card of a network\n" * 9, "neither"),
    "a picture": (lambda torch_file, safe: b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "neither"),
}


@pytest.mark.parametrize("what", NOT_WEIGHTS)
def test_files_that_are_not_weights_are_refused(tmp_path: Path, visual: dict[str, Tensor], what: str) -> None:
    torch.save(visual, tmp_path / "whole.pt")
    save_file(visual, tmp_path / "whole.safetensors")
    make, fact = NOT_WEIGHTS[what]
    for name in ("w.pt", "w.safetensors", "model.safetensors.index.json"):
        file = tmp_path / name
        file.write_bytes(make((tmp_path / "whole.pt").read_bytes(), (tmp_path / "whole.safetensors").read_bytes()))
        with refused(ConfigError, "encoder", file, fact):
            load_encoder(f"{SPEC}@{file}")


def test_archives_of_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.bin").write_bytes(b"x")
    shutil.make_archive(str(tmp_path / "w"), "zip", tmp_path / "in")
    with refused(ConfigError, "encoder", tmp_path / "w.zip", "model.bin"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.zip'}")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor is deprecated")
@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("how", ["sparse", "quantised", "without data", "torch.int8", "torch.complex64"])
def test_tensors_that_are_not_plain_weights_are_refused(tmp_path: Path, visual: dict[str, Tensor], how: str) -> None:
    plain = visual["conv1.weight"]
    odd = {
        "sparse": lambda: plain.to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "without data": lambda: plain.to("meta"),
        "torch.int8": lambda: plain.to(torch.int8),
        "torch.complex64": lambda: plain.to(torch.complex64),
    }[how]()
    torch.save({**visual, "conv1.weight": odd}, tmp_path / "w.pt")
    with refused(ConfigError, "encoder", tmp_path / "w.pt", "'conv1.weight'", how):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, visual: dict[str, Tensor], value: float, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype).clone() for name, tensor in visual.items()}
    state["ln_post.bias"][3] = state["proj"][1, 1] = value
    save_file(state, tmp_path / "w.safetensors")
    with refused(ConfigError, "encoder", tmp_path / "w.safetensors", "'proj'", "1 other"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.safetensors'}")


def test_several_networks_in_one_file(
    tmp_path: Path, visual: dict[str, Tensor], clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that timm would take, or the one below a wrapper's prefix, is used and reported; ties are refused."""
    file, other = tmp_path / "w.pt", dict(scrambled(deepcopy(clip.visual), 2).state_dict())
    torch.save({"state_dict": other, "state_dict_ema": visual}, file)
    _assert_loads(file, clip.visual)
    assert "`state_dict_ema`" in (line := capsys.readouterr().err)
    assert "`state_dict`" in line
    tuned = {f"model.{name}": tensor for name, tensor in visual.items()}
    torch.save({f"original.{name}": tensor for name, tensor in other.items()} | tuned, file)
    _assert_loads(file, clip.visual)
    assert "below `model.`" in capsys.readouterr().err
    torch.save({f"original.{name}": tensor for name, tensor in visual.items()} | tuned, file)
    _assert_loads(file, clip.visual)
    assert capsys.readouterr().err == ""
    torch.save(
        {f"a.{name}": one for name, one in other.items()} | {f"b.{name}": one for name, one in visual.items()}, file
    )
    with refused(ConfigError, "encoder", file, "`a.`", "`b.`"):
        load_encoder(f"{SPEC}@{file}")
