"""A merge with a head: the artifact's labels are the head's rows, matched by name where both have names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamerge.encoders import Head
from merge_service import MergeConfig
from merge_service.merge import Prepared, prepare
from storage_schemas import ConfigError
from tests.support.refusals import refused

LABELS = ["dog", "ant", "cat", "dog"]


def _prepare(folder: Path, head: Head | None, labels: Any = LABELS, **settings: Any) -> Prepared:
    np.savez(folder / "x.npz", images=np.zeros((len(labels), 4, 4), np.uint8), labels=np.array(labels))
    given = {"source": str(folder / "x.npz"), "artifact": str(folder / "a"), "device": "cpu", "members": 1}
    given |= {"grouping": "adversarial", "encoder": "mlp:1x4x4-3", "objective": "cross_entropy", "order": "source"}
    if head is not None:
        (folder / "head.safetensors").write_bytes(head.to_bytes())
        given["head"] = str(folder / "head.safetensors")
    return prepare(MergeConfig.model_validate(given | settings))


def _labels(prepared: Prepared) -> list[int | None]:
    return [group.label for group in prepared.plan.groups]


@pytest.mark.parametrize("names", [["cat", "dog", "ant"], ["Cat", "DOG ", "ant"]])
def test_labels_become_rows_of_the_head(tmp_path: Path, names: list[str]) -> None:
    prepared = _prepare(tmp_path, Head(torch.eye(3), names=names))
    assert _labels(prepared) == [1, 2, 0, 1]
    assert prepared.plan.provenance["source"]["class_names"] == names


def test_a_class_names_file_gives_the_order_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf0: cat\r\n1: dog\r\n2: ant\r\n")
    prepared = _prepare(tmp_path, Head(torch.eye(3)), class_names=str(tmp_path / "names.txt"))
    assert _labels(prepared) == [1, 2, 0, 1]
    assert prepared.head is not None
    assert prepared.head.names == ["cat", "dog", "ant"]


def test_names_in_the_order_of_the_source_change_no_label(tmp_path: Path) -> None:
    prepared = _prepare(tmp_path, Head(torch.eye(3), names=["ant", "cat", "dog"]))
    assert _labels(prepared) == [2, 0, 1, 2]
    assert prepared.plan.provenance["source"]["class_names"] == ["ant", "cat", "dog"]


def test_a_class_that_the_head_lacks_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "head", "1: 'dog'", "'fox'", "`class_names`"):
        _prepare(tmp_path, Head(torch.eye(3), names=["ant", "cat", "fox"]))


def test_labels_without_names_are_positions_and_a_message_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _labels(_prepare(tmp_path, Head(torch.eye(3)))) == [2, 0, 1, 2]
    assert "positions in head" in capsys.readouterr().err
    assert _labels(_prepare(tmp_path, Head(torch.eye(3), names=["x", "y", "z"]), ["2", "0", "1", "2"])) == [
        2,
        0,
        1,
        2,
    ]
    assert "positions in head" in capsys.readouterr().err
    assert _labels(_prepare(tmp_path, None)) == [2, 0, 1, 2]
    assert "positions in the outputs of mlp" in capsys.readouterr().err


def test_missing_labels_are_explained_where_they_are_needed(tmp_path: Path) -> None:
    """The error repeats why listing found no labels: two columns may hold them."""
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), class_id=[0, 1], target=[1, 0])
    for settings in ({"grouping": "label"}, {"grouping": "adversarial", "encoder": "mlp:1x4x4-3"}):
        given = {"source": str(tmp_path / "x.npz"), "artifact": str(tmp_path / "a"), "device": "cpu", **settings}
        if settings["grouping"] == "adversarial":
            given["objective"] = "cross_entropy"
        with pytest.raises(ConfigError, match="class_id, target"):
            prepare(MergeConfig.model_validate(given))
