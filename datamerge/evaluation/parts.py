"""The parts of the evaluation, and `datamerge evaluate all`, which runs those that a TOML file has a table for."""

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
        settings: class of its settings.
        module, function: the function that takes them, imported when it is called, since LLaVA needs packages that
            the other parts do not.
    """

    settings: type[AnyConfig]
    module: str
    function: str

    def evaluate(self, config: AnyConfig) -> Results:
        """Evaluate this part.

        Raises:
            ConfigError: a package is not installed, or the function refuses the settings.
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
        file: TOML file; top-level settings hold for all parts, the table of a part for that part.
        runs: what to evaluate; the file's runs if empty.
        data: raw images; the file's if None.
        output: folder of the results; the file's if None.
        device: where to compute; the file's if None.

    Raises:
        ConfigError: the file cannot be read, has no table of a part, or has wrong settings.
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
