"""The parts of the evaluation, and `datamerge evaluate all`: those a TOML file has a table for, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from datamerge.evaluation.config import OUTPUT, EmbeddingConfig, EvaluateConfig, ImagesConfig, ZeroShotConfig
from datamerge.evaluation.llava.config import CaptionsConfig, LlavaSettings, VqaConfig
from datamerge.evaluation.reports import write_reports
from datamerge.evaluation.store import check_output
from datamerge.evaluation.tables import Results, Row
from datamerge.packages import Unavailable, load
from datamerge.runtime import load_settings, read_toml
from storage_schemas import ConfigError

AnyConfig = ImagesConfig | LlavaSettings


@dataclass(frozen=True)
class Part:
    """One part of the evaluation.

    Attributes:
        settings: its settings class.
        module, function: what evaluates them; imported when called, since LLaVA needs packages that others do not.
    """

    settings: type[AnyConfig]
    module: str
    function: str

    def evaluate(self, config: AnyConfig) -> Results:
        """Carry it out.

        Raises:
            ConfigError: a package is not installed, or what the function refuses.
        """
        try:
            function = load(
                f"datamerge.evaluation.{self.module}", self.function, extra="eval", needed_by=self.function
            )
        except Unavailable as error:
            raise ConfigError(str(error)) from None
        return cast(Results, function(config))


PARTS = {
    "pgd": Part(EvaluateConfig, "pgd", "evaluate"),
    "zero-shot": Part(ZeroShotConfig, "zero_shot", "evaluate_zero_shot"),
    "embedding": Part(EmbeddingConfig, "embedding", "evaluate_embedding"),
    "captions": Part(CaptionsConfig, "llava.captions", "evaluate_captions"),
    "vqa": Part(VqaConfig, "llava.vqa", "evaluate_vqa"),
}


def evaluate_all(
    file: str, runs: Sequence[str], *, data: str | None = None, output: str | None = None, device: str | None = None
) -> list[Row]:
    """Evaluate all parts of a file; returns the rows of the common table.

    Every part's settings are checked before the first one starts.

    Args:
        file: TOML; top-level settings hold for all parts, a table named after a part for that one.
        runs: what to evaluate; those of the file if empty.
        data: raw images, instead of the file's.
        output: folder, instead of the file's.
        device: instead of the file's.

    Raises:
        ConfigError: the file cannot be read, has no part, or settings that are wrong.
    """
    content = read_toml(file)
    tables = {name: content.pop(name) for name in PARTS if isinstance(content.get(name), dict)}
    if not tables:
        raise ConfigError(f"{file}: expected at least one table of {', '.join(f'[{name}]' for name in PARTS)}")
    folder = output or str(content.get("output", OUTPUT))
    check_output(folder)
    configs = {}
    for name, table in tables.items():
        values: dict[str, Any] = {**content, **table, "output": folder}
        values |= {"runs": list(runs)} if runs else {}
        values |= {"device": device} if device else {}
        values |= {"data": data} if data and issubclass(PARTS[name].settings, ImagesConfig) else {}
        try:
            configs[name] = load_settings(PARTS[name].settings, None, values)
        except ConfigError as error:
            raise ConfigError(f"{file}, [{name}]: {error}", about=error.field) from None
    rows: list[Row] = []
    for name, config in configs.items():
        rows = write_reports(folder, name, PARTS[name].evaluate(config))
    return rows
