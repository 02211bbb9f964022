"""Encoder specs: one string names the network and its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamerge.encoders import at_home, parse_spec, with_checkpoint
from storage_schemas import ConfigError
from tests.support.refusals import refused


@pytest.mark.parametrize(
    ("text", "kind", "model", "pretrained"),
    [
        ("open_clip:ViT-L-14/openai", "open_clip", "ViT-L-14", "openai"),
        ("open_clip:ViT-B-32", "open_clip", "ViT-B-32", None),
        ("timm:resnet50/a1_in1k", "timm", "resnet50", "a1_in1k"),
        ("timm:resnet50/pretrained", "timm", "resnet50", "pretrained"),
        ("mlp:1x28x28-512-10", "mlp", "1x28x28-512-10", None),
        ("python:my.models:encoder", "python", "my.models:encoder", None),
    ],
)
def test_valid_specs_are_parsed(text: str, kind: str, model: str, pretrained: str | None) -> None:
    spec = parse_spec(text)
    assert (spec.kind, spec.model, spec.pretrained, spec.checkpoint) == (kind, model, pretrained, None)
    assert str(spec) == text
    assert parse_spec(str(spec)) == spec


def test_folders_in_place_of_files_are_refused(tmp_path: Path) -> None:
    """FSDP writes folders of shards, which torch can convert to a file."""
    with refused(ConfigError, "encoder", tmp_path, "name the file"):
        parse_spec(f"timm:resnet50@{tmp_path}")
    (tmp_path / ".metadata").touch()
    with refused(ConfigError, "encoder", tmp_path, "dcp_to_torch"):
        parse_spec(f"timm:resnet50@{tmp_path}")


def test_a_tag_in_timms_spelling_is_recognised() -> None:
    """As part of the model's name, timm would ignore it and use random weights."""
    assert str(parse_spec("timm:resnet50.a1_in1k,image_size=96")) == "timm:resnet50/a1_in1k,image_size=96"
    assert parse_spec("timm:local-dir:/a.b/c").model == "local-dir:/a.b/c"


@pytest.mark.parametrize("text", ["timm:resnet50/random", "timm:resnet50/", "timm:resnet50"])
def test_random_is_not_a_tag(text: str) -> None:
    assert str(parse_spec(text)) == "timm:resnet50"


@pytest.mark.parametrize(
    "head", ["open_clip:ViT-B-32", "timm:resnet50", "mlp:1x28x28-512-10", "python:my.models:encoder"]
)
@pytest.mark.parametrize("name", ["w.pt", "deep/er/w.safetensors", "at@sign/colon:x.pt"])
def test_checkpoints_are_parsed(tmp_path: Path, head: str, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    spec = parse_spec(f"{head}@{path}")
    assert f"{spec.kind}:{spec.model}" == head
    assert spec.checkpoint == str(path)
    assert parse_spec(str(spec)) == spec
    assert with_checkpoint(head, str(path)) == str(spec)
    assert with_checkpoint(str(spec), "other.pt") == f"{head}@other.pt"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("open_clip:ViT-B-32/openai", "open_clip:ViT-B-32/openai@w.pt"),
        ("timm:resnet50/a1_in1k,image_size=96", "timm:resnet50/a1_in1k,image_size=96@w.pt"),
        ("timm:resnet50@old/path.pt", "timm:resnet50@w.pt"),
        ("mlp:1x4x4-2", "mlp:1x4x4-2@w.pt"),
    ],
)
def test_with_checkpoint_replaces_the_file_and_keeps_the_tag(spec: str, expected: str) -> None:
    assert with_checkpoint(spec, "w.pt") == expected


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "python:module:factory,"),
        ("resnet50", "python:module:factory,"),
        ("torchvision:resnet50", "python:module:factory,"),
        ("timm", "python:module:factory,"),
        ("timm:", "python:module:factory,"),
        ("timm:/a1", "name"),
        ("OPEN_CLIP:ViT-B-32", "python:module:factory,"),
        ("timm:resnet50@", f" '{Path.cwd()}' "),
        ("timm:resnet50@nowhere.pt", f" '{Path.cwd()}/nowhere.pt' "),
        ("mlp:1x4x4-2@.", f" '{Path.cwd()}' "),
        ("timm:resnet50,image_size=4097", " 4096 "),
        ("timm:resnet50,image_size=0", "'0'"),
        ("hf:org/name,image_size=big", "'big'"),
        ("open_clip:local-dir:/folder,image_size=", "''"),
    ],
)
def test_invalid_specs_are_refused(text: str, fact: str) -> None:
    with refused(ConfigError, "encoder", repr(text), fact):
        parse_spec(text)


def test_a_tag_stays_beside_a_file(tmp_path: Path) -> None:
    """The tag says which preprocessing and which text tower belong to the weights of the file."""
    path = tmp_path / "w.pt"
    path.touch()
    spec = parse_spec(f"timm:resnet50/a1_in1k@{path}")
    assert (spec.pretrained, spec.checkpoint) == ("a1_in1k", str(path))


@pytest.mark.parametrize(
    ("text", "model", "revision", "image_size", "checkpoint"),
    [
        ("open_clip:hf-hub:org/name", "hf-hub:org/name", None, None, None),
        ("open_clip:hf-hub:org/name@/w.pt", "hf-hub:org/name", None, None, "/w.pt"),
        ("open_clip:local-dir:/a@b/c,image_size=64", "local-dir:/a@b/c", None, 64, None),
        ("timm:hf-hub:org/name@main", "hf-hub:org/name", "main", None, None),
        ("hf:org/name", "org/name", None, None, None),
        ("hf:org/name@v1,image_size=336@/a@b/w.safetensors", "org/name", "v1", 336, "/a@b/w.safetensors"),
        ("hf:/folder@x/y", "/folder@x/y", None, None, None),
        ("open_clip:ViT-L-14/openai,image_size=336@/a,b@c/w.pt", "ViT-L-14", None, 336, "/a,b@c/w.pt"),
    ],
)
def test_names_of_hubs_and_folders(
    text: str, model: str, revision: str | None, image_size: int | None, checkpoint: str | None
) -> None:
    """An @ may begin a revision or a file, or belong to a path; missing files can be replaced in a spec."""
    moved = with_checkpoint(text, "/new/w.pt")
    assert moved == (text.removesuffix(f"@{checkpoint}") if checkpoint else text) + "@/new/w.pt"
    if checkpoint is None:
        spec = parse_spec(text)
        assert (spec.model, spec.revision, spec.image_size, spec.checkpoint) == (model, revision, image_size, None)
        assert str(spec) == text


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pt").touch()
    assert parse_spec("mlp:1x4x4-2@~/w.pt").checkpoint == str(tmp_path / "w.pt")


def test_a_copied_run_has_its_own_weights(tmp_path: Path) -> None:
    """Not those of the folder that it was copied from, which may have been trained again."""
    for name in ("first", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "encoder.safetensors").touch()
    spec = f"open_clip:ViT-B-32@{tmp_path}/first/encoder.safetensors"
    assert at_home(spec, tmp_path / "copy") == f"open_clip:ViT-B-32@{tmp_path}/copy/encoder.safetensors"
    assert at_home(spec, tmp_path / "nowhere") == spec
    assert at_home("mlp:1x2x2-3", tmp_path / "copy") == "mlp:1x2x2-3"
