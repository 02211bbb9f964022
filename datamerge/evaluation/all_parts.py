"""`datamerge evaluate all`: every part that a TOML file has a table for, into one report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datamerge.evaluation.config import OUTPUT, EmbeddingConfig, ZeroShotConfig
from datamerge.evaluation.embedding import evaluate_embedding
from datamerge.evaluation.llava.captions import evaluate_captions
from datamerge.evaluation.llava.config import CaptionsConfig, VqaConfig
from datamerge.evaluation.llava.vqa import evaluate_vqa
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.store import check_output
from datamerge.evaluation.tables import PARTS, Row, write_reports
from datamerge.evaluation.zero_shot import evaluate_zero_shot
from datamerge.runtime import Settings, load_settings, read_toml
from storage_schemas import ConfigError

_ON_IMAGES = ("zero-shot", "embedding")


def evaluate_all(
    file: str, runs: Sequence[str], *, data: str | None = None, output: str | None = None, device: str | None = None
) -> list[Row]:
    """Evaluate all parts of a file; returns the rows of the common table.

    Every part's settings are checked before the first one starts.

    Args:
        file: TOML; top-level settings hold for all parts, a table named after a part for that one.
        runs: what to evaluate; those of the file if empty.
        data: images of zero-shot and embedding, instead of the file's.
        output: folder, instead of the file's.
        device: instead of the file's.

    Raises:
        ConfigError: the file cannot be read, has no part, or settings that are wrong.
    """
    content = read_toml(file)
    parts = {name: content.pop(name) for name in PARTS if isinstance(content.get(name), dict)}
    if not parts:
        raise ConfigError(f"{file}: expected at least one table of {', '.join(f'[{name}]' for name in PARTS)}")
    folder = output or str(content.get("output", OUTPUT))
    check_output(folder)
    jobs: list[tuple[str, Callable[[], list[ArmResult]]]] = []
    for name, table in parts.items():
        values: dict[str, Any] = {**content, **table, "output": folder}
        values |= {"runs": list(runs)} if runs else {}
        values |= {"device": device} if device else {}
        values |= {"data": data} if data and name in _ON_IMAGES else {}
        jobs.append((name, _job(name, values, file)))
    rows: list[Row] = []
    for name, job in jobs:
        rows = write_reports(folder, name, job())
    return rows


def _job(part: str, values: Mapping[str, Any], file: str) -> Callable[[], list[ArmResult]]:
    def settings(model: type[Settings]) -> Any:
        try:
            return load_settings(model, None, values)
        except ConfigError as error:
            raise ConfigError(f"{file}, [{part}]: {error}") from None

    if part == "zero-shot":
        zero_shot = settings(ZeroShotConfig)
        return lambda: evaluate_zero_shot(zero_shot)
    if part == "embedding":
        embedding = settings(EmbeddingConfig)
        return lambda: evaluate_embedding(embedding)
    if part == "captions":
        captions = settings(CaptionsConfig)
        return lambda: evaluate_captions(captions)
    vqa = settings(VqaConfig)
    return lambda: evaluate_vqa(vqa)
