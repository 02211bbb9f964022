"""Encoders: determined by their spec, with the normalisation inside, and unchanged by saving and loading."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from datamerge.demo.digits import digit_encoder
from datamerge.encoders import Encoder, load_encoder, save_encoder, weights_sha256
from datamerge.encoders.building import RANDOM_WEIGHTS_SEED, seeded
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused

SPEC = "mlp:3x4x5-16-6"


def _pixels(count: int = 4) -> Tensor:
    return torch.rand((count, 3, 4, 5), generator=torch.Generator().manual_seed(1))


def _shifted(path: Path) -> Encoder:
    """An encoder with other weights than the spec's, saved at `path`."""
    encoder = load_encoder(SPEC)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.25)
    save_encoder(encoder, path)
    return encoder


def test_a_spec_means_the_same_network_every_time() -> None:
    """It neither depends on the global random state nor changes it."""
    torch.manual_seed(1)
    first = load_encoder(SPEC)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = load_encoder(SPEC)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.sha256 == second.sha256 == weights_sha256(second.model)
    assert torch.equal(first(_pixels()), second(_pixels()))
    assert first.random_weights
    assert (first.input_shape, first.embedding_dim, first.spec) == ((3, 4, 5), 6, SPEC)
    assert not first.training


def test_the_hash_covers_names_types_shapes_and_bytes() -> None:
    """The test shows how other tools can compute it."""
    model = load_encoder("mlp:1x1x2-3").model
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} torch.float32 {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    assert weights_sha256(model) == digest.hexdigest()


def test_one_bit_changes_the_hash() -> None:
    encoder = load_encoder(SPEC)
    before = weights_sha256(encoder.model)
    with torch.no_grad():
        weight = next(encoder.parameters())
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert weights_sha256(encoder.model) != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_any_dtype_can_be_hashed(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.register_buffer("scalar", torch.tensor(1).to(dtype))
    model.register_buffer("transposed", torch.arange(6).reshape(2, 3).to(dtype).T)
    assert len(weights_sha256(model)) == 64


def test_specs_differ_in_their_hash() -> None:
    specs = (SPEC, "mlp:3x4x5-16-7", "mlp:3x5x4-16-6-6")
    assert len({load_encoder(spec).sha256 for spec in specs}) == 3


@pytest.mark.parametrize("name", ["w.safetensors", "weights 2.safetensors"])
def test_saved_weights_come_back_bit_by_bit(tmp_path: Path, name: str) -> None:
    encoder = _shifted(tmp_path / name)
    loaded = load_encoder(f"{SPEC}@{tmp_path / name}")
    assert loaded.sha256 == weights_sha256(encoder.model) != load_encoder(SPEC).sha256
    assert torch.equal(loaded(_pixels()), encoder(_pixels()))
    assert not loaded.random_weights


def test_channels_last_changes_neither_hash_nor_file_nor_embeddings(tmp_path: Path) -> None:
    """All are those of the network as its factory builds it; patch embeddings are not converted."""
    plain, loaded = digit_encoder(), load_encoder("python:datamerge.demo.digits:digit_encoder")
    plain.load_state_dict(loaded.model.state_dict())
    assert loaded.model.get_parameter("2.weight").is_contiguous(memory_format=torch.channels_last)
    assert weights_sha256(plain) == loaded.sha256
    save_encoder(loaded, tmp_path / "w.safetensors")
    metadata = {"preprocessing": json.dumps(loaded.preprocessing.record())}
    save_file(dict(plain.state_dict()), tmp_path / "plain.safetensors", metadata)
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    pixels = torch.rand((3, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(pixels), plain.eval()(pixels), atol=1e-5, rtol=1e-5)
    patches = load_encoder("timm:vit_tiny_patch16_224").model.get_parameter("patch_embed.proj.weight")
    assert patches.is_contiguous()


def test_saving_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_encoder(load_encoder(SPEC), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Errno 28"):
        save_encoder(load_encoder(SPEC), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("wrapper", ["plain", "state_dict", "model", "module.", "visual.", "extra"])
def test_torch_files_and_their_usual_wrappers(tmp_path: Path, wrapper: str) -> None:
    """torch.save of a state_dict, of a training checkpoint, of DataParallel, of a whole CLIP, of a classifier."""
    state = dict(_shifted(tmp_path / "w.safetensors").model.state_dict())
    saved: dict[str, Any] = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "module.": {f"module.{name}": value for name, value in state.items()},
        "visual.": {**{f"visual.{name}": value for name, value in state.items()}, "logit_scale": torch.ones(())},
        "extra": {**state, "fc.weight": torch.ones(10, 6)},
    }[wrapper]
    torch.save(saved, tmp_path / "w.pt")
    expected = load_encoder(f"{SPEC}@{tmp_path / 'w.safetensors'}").sha256
    assert load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}").sha256 == expected


def test_missing_and_misshaped_tensors_are_counted(tmp_path: Path) -> None:
    state = load_encoder(SPEC).model.state_dict()
    path = tmp_path / "w.safetensors"
    save_file({name: value for name, value in state.items() if not name.startswith("3")}, path)
    with refused(ConfigError, "encoder", SPEC, path, "'3.bias' (2 ", ", 0 "):
        load_encoder(f"{SPEC}@{path}")
    save_file({**state, "3.weight": torch.zeros(7, 16)}, path)
    with refused(ConfigError, "encoder", SPEC, path, "'3.weight' (0 ", ", 1 "):
        load_encoder(f"{SPEC}@{path}")
    save_encoder(load_encoder("mlp:3x4x5-7-6"), path)
    with refused(ConfigError, "encoder", SPEC, path, "'1.bias' (0 ", ", 3 "):
        load_encoder(f"{SPEC}@{path}")


class Exploit:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    trap, file = tmp_path / "executed", tmp_path / "w.pt"
    state = {"1.weight": torch.zeros(16, 60), "evil": Exploit(trap)}
    if how == "torch.save":
        torch.save(state, file)
    else:
        file.write_bytes(pickle.dumps(state))
    with refused(ConfigError, "encoder", file, "tensors"):
        load_encoder(f"{SPEC}@{file}")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("data", [b"", b"text, not weights", random.Random(0).randbytes(500), b"PK\x03\x04zip?"])
def test_files_without_weights_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with refused(ConfigError, "encoder", tmp_path / name):
        load_encoder(f"{SPEC}@{tmp_path / name}")


@pytest.mark.parametrize("saved", [[1, 2], {"a": 1}, {0: torch.zeros(3)}, torch.zeros(3)])
def test_files_that_are_not_state_dicts_are_refused(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with refused(ConfigError, "encoder", "state_dict", tmp_path / "w.pt"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")


def test_tensors_that_cannot_be_copied_are_refused(tmp_path: Path) -> None:
    state = load_encoder(SPEC).model.state_dict()
    torch.save({**state, "3.bias": torch.empty(6, device="meta")}, tmp_path / "w.pt")
    with refused(ConfigError, "encoder", tmp_path / "w.pt", "copied"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")


def test_the_encoder_normalises_its_input() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 4))
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    encoder = Encoder(network, "x", Preprocessing(shape=(3, 4, 5), mean=mean, std=std), random_weights=True)
    outside = torch.stack([(_pixels()[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(encoder(_pixels()), network(outside), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(encoder(_pixels()), network(_pixels()))
    assert set(encoder.state_dict()) == {"model.1.weight", "model.1.bias"}  # the statistics are not weights


@pytest.mark.parametrize(
    "model",
    ["1x4x4", "4x4-2", "1x4x4-", "1x4x4-0", "0x4x4-2", "1x4x4-2-a", "1x4x4_2", "00x4x4-2", "1x4x4-" + "9" * 5000],
)
def test_malformed_mlps_are_refused(model: str) -> None:
    with refused(ConfigError, "encoder", "mlp:CxHxW", f"'mlp:{model[:20]}"):
        load_encoder(f"mlp:{model}")


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("3x30000x30000-100000", 2_700_000_000 * 100_000 + 100_000),
        ("9999999999x9999999999x9999999999-1", 9999999999**3 + 1),
        ("1x1x1-65536-65536", 65536 * (1 + 1 + 65536 + 1)),
    ],
)
def test_mlps_that_would_fill_the_memory_are_refused(model: str, weights: int) -> None:
    with refused(ConfigError, "encoder", 2**31, weights, f"'mlp:{model}'"):
        load_encoder(f"mlp:{model}")


@pytest.mark.parametrize(
    ("output", "facts"),
    [
        (lambda x: x, ["[1, K]", "(1, 3, 4, 5)"]),
        (lambda x: [x], ["[1, K]", "list"]),
        (lambda x: x @ torch.zeros(9, 9), ["(3, 4, 5)", "12x5 and 9x9"]),
        (lambda x: (_ for _ in ()).throw(ValueError()), ["(3, 4, 5)", "ValueError"]),
        (lambda x: (_ for _ in ()).throw(RuntimeError("two\nlines")), ["(3, 4, 5)", ": two"]),
    ],
)
def test_networks_that_give_no_embeddings_are_refused(output: Any, facts: list[str]) -> None:
    class Odd(nn.Module):
        def forward(self, pixels: Tensor) -> Any:
            return output(pixels)

    with refused(ConfigError, "encoder", "'python:odd:net'", *facts):
        Encoder(Odd(), "python:odd:net", Preprocessing(shape=(3, 4, 5)), random_weights=False)


FACTORIES = """
import torch
from torch import nn

def good():
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 6))
    model.input_shape = (3, 4, 5)
    return model

def shapeless():
    return nn.Flatten()

def flat():
    model = good()
    model.input_shape = (60,)
    return model

def no_module():
    return len

def declares():
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 6))
    model.preprocessing = {"shape": [3, 4, 5], "resize": "squash", "mean": [0.5], "std": [0.25]}
    return model

def declares_a_record():
    from storage_schemas.schema.preprocessing import Preprocessing

    model = good()
    model.preprocessing = Preprocessing(shape=(3, 4, 5), resize="longest", fill=(7,))
    return model

def declares_nonsense():
    model = good()
    model.preprocessing = {"shape": [3, 4, 5], "resize": "somehow"}
    return model
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module in the working directory, which a console script does not have on its path."""
    (tmp_path / "temporary_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    return tmp_path


def test_a_custom_factory_builds_an_encoder(factories: Path) -> None:
    encoder = load_encoder("python:temporary_factories:good")
    assert (encoder.input_shape, encoder.embedding_dim, encoder.random_weights) == ((3, 4, 5), 6, False)
    assert encoder.sha256 == load_encoder("python:temporary_factories:good").sha256
    torch.testing.assert_close(encoder(_pixels()), encoder.model(_pixels()))  # no normalisation is added
    save_encoder(encoder, factories / "w.safetensors")
    loaded = load_encoder("python:temporary_factories:good@w.safetensors")
    assert loaded.sha256 == encoder.sha256


def test_factories_may_declare_their_preprocessing(factories: Path) -> None:
    encoder = load_encoder("python:temporary_factories:declares")
    assert encoder.preprocessing == Preprocessing(shape=(3, 4, 5), resize="squash", mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.testing.assert_close(encoder(_pixels()), encoder.model((_pixels() - 0.5) / 0.25))
    save_encoder(encoder, factories / "w.safetensors")
    loaded = load_encoder("python:temporary_factories:declares@w.safetensors")
    assert (loaded.sha256, loaded.preprocessing) == (encoder.sha256, encoder.preprocessing)
    plain = load_encoder("python:temporary_factories:declares_a_record")
    assert (plain.preprocessing.resize, plain.preprocessing.fill) == ("longest", (7, 7, 7))
    torch.testing.assert_close(plain(_pixels()), plain.model(_pixels()))  # no normalisation is added


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ("mlp:3x4x5-6,image_size=5", ["(3, 4, 5)", "(3, 5, 5)", "image_size"]),
        ("python:temporary_factories:good,image_size=5", ["(3, 4, 5)", "(3, 5, 5)", "image_size"]),
        ("mlp:3x5x4-6@w.safetensors", ["(3, 5, 4)", "(3, 4, 5)", "w.safetensors"]),
    ],
)
def test_custom_networks_refuse_other_sizes(factories: Path, spec: str, facts: list[str]) -> None:
    save_encoder(load_encoder("mlp:3x4x5-6"), factories / "w.safetensors")
    with refused(ConfigError, "encoder", *facts):
        load_encoder(spec)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("temporary_factories", ["python:MODULE:FACTORY"]),
        ("temporary_factories:", ["python:MODULE:FACTORY"]),
        ("temporary_factories:nobody", ["nobody", "temporary_factories.py"]),
        ("no_such_module_at_all:x", ["no_such_module_at_all"]),
        ("temporary_factories:shapeless", ["Flatten", "input_shape None"]),
        ("temporary_factories:flat", ["Sequential", "input_shape (60,)"]),
        ("temporary_factories:declares_nonsense", ["preprocessing.resize"]),
        ("temporary_factories:no_module", ["builtin_function_or_method"]),
    ],
)
@pytest.mark.usefixtures("factories")
def test_bad_factories_are_refused(name: str, facts: list[str]) -> None:
    with refused(ConfigError, "encoder", f"'python:{name}'", *facts):
        load_encoder(f"python:{name}")


def test_where_a_missing_module_was_looked_for_is_named(factories: Path) -> None:
    with refused(ConfigError, "encoder", factories):
        load_encoder("python:no_such_module_at_all:x")


def test_random_weights_do_not_seed_the_generators_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded_everywhere: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded_everywhere.append)
    state = torch.random.get_rng_state()
    with seeded():
        found = torch.rand(4)
    assert seeded_everywhere == []
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        assert torch.equal(torch.rand(4), found)
    assert seeded_everywhere == [RANDOM_WEIGHTS_SEED]
