"""Summary, dataset card and contact sheet of an artifact."""

from __future__ import annotations

import gc
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from storage_schemas import ConfigError, Layout, Record, open_artifact
from storage_schemas.card.contact_sheet import GAP, HEADER, TILE, contact_sheet
from storage_schemas.card.dataset_card import dataset_card
from storage_schemas.card.summary import summarise
from tests.support.refusals import refused

Write = Callable[..., list[Record]]


def test_summary_numbers_are_those_of_the_records(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str, encoding_name: str
) -> None:
    records = write_artifact(tmp_path / "a", make_layout(format_name, encoding_name), (1,))
    facts = summarise(open_artifact(tmp_path / "a"))
    means = np.stack([record.mean for record in records])
    variances = np.stack([record.variance for record in records]).astype(np.float64)
    assert facts["groups"] == 6
    assert facts["planned_groups"] == 7
    assert facts["members"] == {"min": 2, "max": 4, "total": sum(record.count for record in records)}
    assert (facts["shards"], facts["planned_shards"], facts["complete"]) == (3, 3, True)
    assert facts["labelled"] == sum(record.label is not None for record in records)
    assert facts["moments"]["mean_min"] == means.min()
    assert facts["moments"]["mean_max"] == means.max()
    assert facts["moments"]["variance_max"] == variances.max()
    assert facts["moments"]["variance_mean"] == pytest.approx(variances.mean(), rel=1e-12)
    assert facts["moments"]["clipped_variances"] == sum(record.clipped_variances() for record in records)
    assert facts["attack_loss"] == pytest.approx(np.mean([record.info["attack_loss"] for record in records]))
    assert facts["attack_loss_start"] == 0.25
    assert facts["rejects"] == [{"key": "k1", "sample": "photos/1.png", "reason": "not an image"}]
    assert facts["bytes_per_value"] == facts["bytes"] / (2 * 6 * 60)
    assert facts["pixels"] == [3, 4, 5]
    json.dumps(facts)


def test_summary_of_an_artifact_without_groups(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    """Every group was rejected: no division by zero, no invented extremes."""
    write_artifact(tmp_path / "a", make_layout("webdataset"), tuple(range(7)))
    artifact = open_artifact(tmp_path / "a")
    facts = summarise(artifact)
    assert facts["groups"] == 0
    assert facts["bytes_per_value"] is None
    assert facts["attack_loss"] is None
    assert facts["moments"]["mean_min"] is facts["moments"]["variance_mean"] is None
    assert len(facts["rejects"]) == 7
    assert "0 groups" in dataset_card(facts)
    with refused(ConfigError, None, tmp_path / "a", "group"):
        contact_sheet(artifact)


def test_the_card_is_markdown_with_yaml_in_front(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str, encoding_name: str
) -> None:
    write_artifact(tmp_path / "a", make_layout(format_name, encoding_name))
    artifact = open_artifact(tmp_path / "a")
    text = dataset_card(summarise(artifact))
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match is not None
    front = yaml.safe_load(match[1])
    assert front["size_categories"] == ["n<1K"]
    assert format_name in front["tags"]
    for spec in artifact.manifest.layout.arrays:
        assert f"| `{spec.name}` | {spec.dtype} | {list(spec.shape)} |" in text
    provenance = json.loads(text.rpartition("```json\n")[2].partition("```")[0])
    assert provenance["seed"] == 7
    assert provenance["source"]["fingerprint"] == "f00"
    assert text == dataset_card(summarise(open_artifact(tmp_path / "a")))


def test_the_cards_python_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    format_name: str,
) -> None:
    """Every snippet works in the artifact's folder, as the card claims."""
    write_artifact(tmp_path / "a", make_layout(format_name))
    monkeypatch.chdir(tmp_path / "a")
    card = dataset_card(summarise(open_artifact(".")))
    Path("README.md").write_text(card, "utf-8")
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 3
    ours: dict[str, object] = {}
    exec(snippets[0], ours)
    assert isinstance(ours["record"], Record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party readers leave files open and call deprecated functions
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        for snippet in snippets[1:]:
            stock: dict[str, Any] = {}
            exec(snippet, stock)
            groups = stock.pop("groups")
            assert (sum(np.asarray(groups["count"]) > 0) if format_name == "zarr" else len(list(groups))) == 7
            del groups, stock
        gc.collect()


@pytest.mark.parametrize(
    ("extras", "columns"), [((), 2), (("clean",), 4), (("members",), 7), (("members", "clean"), 8)]
)
@pytest.mark.parametrize("groups", [1, 3, 50])
def test_contact_sheet_has_a_tile_for_every_picture(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    extras: tuple[str, ...],
    columns: int,
    groups: int,
) -> None:
    """Clean, four members, mean, difference (if there is a reference) and variance; one row a group."""
    write_artifact(tmp_path / "a", make_layout("webdataset", extras=extras))
    with Image.open(io.BytesIO(contact_sheet(open_artifact(tmp_path / "a"), groups))) as image:
        assert image.format == "PNG"
        rows = min(groups, 7)
        assert image.width == GAP + columns * (TILE + GAP)
        assert image.height == HEADER + rows * (TILE + HEADER + GAP) + GAP


def test_contact_sheet_shows_the_mean(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    records = write_artifact(tmp_path / "a", make_layout("webdataset", extras=()))
    png = contact_sheet(open_artifact(tmp_path / "a"), keys=["k4"])
    with Image.open(io.BytesIO(png)) as image:
        tile = np.asarray(image.crop((GAP, HEADER, GAP + TILE, HEADER + TILE)))
    expected = (records[4].mean * 255).round().astype(np.uint8).transpose(1, 2, 0)
    rows = np.minimum((np.arange(TILE) + 0.5) * 4 / TILE, 3).astype(int)
    columns = np.minimum((np.arange(TILE) + 0.5) * 5 / TILE, 4).astype(int)
    np.testing.assert_array_equal(tile, expected[rows][:, columns])


def test_contact_sheet_names_an_unknown_key(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("webdataset"))
    with refused(ConfigError, None, tmp_path / "a", "'nobody'"):
        contact_sheet(open_artifact(tmp_path / "a"), keys=["nobody"])
