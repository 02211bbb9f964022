"""The artifact's README.md: a dataset card with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from storage_schemas.errors import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.provenance import are_clean

_LOAD = {
    "zarr": """With stock zarr, xarray or tensorstore; row i is a group if `count[i]` > 0:

```python
import zarr
groups = zarr.open_group("groups.zarr", mode="r")
```

```python
import xarray
groups = xarray.open_zarr("groups.zarr", consolidated=False)
```

`datasets.load_dataset` reads no Zarr; `datamerge convert THIS TARGET --format webdataset` writes what it reads.""",
    "webdataset": """With stock webdataset or datasets:

```python
import glob, webdataset
groups = webdataset.WebDataset(sorted(glob.glob("shards/*.tar")), shardshuffle=False).decode()
```

```python
import os, datasets
groups = datasets.load_dataset(os.getcwd(), split="train")   # the folder, or its name on the Hub
```

`datasets` reads the types of the columns here; the first groups alone, by which it goes else, may have no label.""",
}

_MOMENTS = {
    "uint8_moments": "`sum` S and `scatter` Q are integers: mean = S / 255N, variance = Q / (255N)², N = `count`",
    "float32": "`mean` and `mean_square` as they are; variance = max(mean_square − mean², 0)",
}

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
    (1_000_000_000, "100M<n<1B"),
    (10**15, "n>1B"),
)


def license_of(facts: Mapping[str, Any]) -> str:
    """Licence as the provenance has it, an identifier of the Hugging Face Hub; `other` if it has none."""
    return str(facts["provenance"].get("license") or "other")


def describe(facts: Mapping[str, Any]) -> str:
    """One paragraph on what the groups are."""
    members, recorded = facts["members"], recorded_preprocessing(facts)
    made = "" if recorded is None else f" How pixels are made of images: {recorded}."
    if are_clean(facts["provenance"]) and members["max"] == 1:
        what = "clean images and their embeddings" if "target" in facts["arrays"] else "clean images"
        groups = f"{facts['groups']} {what}, each a group of its own: its mean is the image and its variance 0,"
    else:
        groups = (
            f"{facts['groups']} groups of {members['min']} to {members['max']} samples, each reduced to its "
            "mean and mean square"
        )
    return f"{groups} over pixels {facts['pixels']} in [0, 1] (before any normalisation, divisor N).{made}"


def recorded_preprocessing(facts: Mapping[str, Any]) -> Preprocessing | None:
    """How pixels were made of images, where the provenance says so in words of this release."""
    try:
        return Preprocessing.of_artifact(facts["provenance"], facts["url"])
    except ConfigError:
        return None


def dataset_card(facts: Mapping[str, Any]) -> str:
    """Markdown text from the facts of `summarise`."""
    provenance = {key: value for key, value in facts["provenance"].items() if key != "source"}
    source = facts["provenance"].get("source")
    if isinstance(source, dict):
        provenance["source"] = {key: value for key, value in source.items() if key != "class_names"}
    arrays = "\n".join(f"| `{name}` | {spec['dtype']} | {spec['shape']} |" for name, spec in facts["arrays"].items())
    return f"""---
{_front_matter(facts)}
---

# Merged groups

{describe(facts)} {facts["shards"]} shards, {facts["bytes"]} bytes, format `{facts["format"]}`, encoding
`{facts["encoding"]}`, schema version {facts["schema_version"]}, written by {facts["writer"]}. The licence of the
source applies.

![some of the groups](preview.png)

| array | dtype | shape per group |
|---|---|---|
{arrays}

{_MOMENTS[facts["encoding"]]}.

## Load

```python
import datamerge as dm
record = dm.open_artifact(".")[0]   # record.mean, record.mean_square, record.variance, record.target, …
```

{_LOAD[facts["format"]]}

## Provenance

```json
{json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False)}
```
"""


def _front_matter(facts: Mapping[str, Any]) -> str:
    lines = [
        "pretty_name: datamerge artifact",
        f"license: {json.dumps(license_of(facts))}",  # a JSON string is a YAML string
        "size_categories:",
        f"- {next(name for limit, name in _SIZES if facts['groups'] < limit)}",
        "task_categories:",
        "- image-feature-extraction",
        "tags:",
        "- adversarial-training",
        "- datamerge",
        f"- {facts['format']}",
    ]
    if facts["format"] == "webdataset":
        # The Hub's viewer then takes the tars alone, and none of the artifact's JSON.
        lines += ["configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: shards/*.tar"]
        lines += _features(facts["arrays"])
    else:
        lines.append("viewer: false")  # the Hub's, which would take croissant.json for data
    return "\n".join(lines)


def _features(arrays: Mapping[str, Any]) -> list[str]:
    """Types of the columns for `datasets`, which else takes them from the first five groups: labels may be null."""
    lines = ["dataset_info:", "  features:", "  - name: json", "    struct:"]
    lines += ["    - name: count", "      dtype: int64", "    - name: label", "      dtype: int64"]
    lines += ["    - name: samples", "      list: string"]
    for name, spec in arrays.items():
        lines += [f"  - name: {name}.npy", *(f"{'  ' * level}list:" for level in range(2, 2 + len(spec["shape"])))]
        lines[-1] += f" {spec['dtype']}"
    for name in ("__key__", "__url__"):
        lines += [f"  - name: {name}", "    dtype: string"]
    return lines
