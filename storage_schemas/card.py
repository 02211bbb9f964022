"""The artifact's README.md: a dataset card with the front matter that the Hugging Face Hub reads."""

from __future__ import annotations

import json

from storage_schemas.artifact import Artifact
from storage_schemas.summary import summarise

_LOAD = {
    "zarr": """```python
import zarr
groups = zarr.open_group("groups.zarr", mode="r")   # row i is a group if groups["count"][i] > 0
```""",
    "webdataset": """```python
import glob, webdataset
groups = webdataset.WebDataset(sorted(glob.glob("shards/*.tar")), shardshuffle=False).decode()
```""",
}

_MOMENTS = {
    "uint8_moments": "`sum` S and `scatter` Q are integers: mean = S / 255N, variance = Q / (255N)², N = `count`",
    "float32": "`mean` and `mean_square` as they are; variance = max(mean_square − mean², 0)",
}


def dataset_card(artifact: Artifact) -> str:
    """Markdown text; depends on nothing but the artifact's content."""
    facts = summarise(artifact)
    provenance = {key: value for key, value in facts["provenance"].items() if key != "source"}
    source = dict(facts["provenance"].get("source", {}))
    source.pop("class_names", None)
    arrays = "\n".join(f"| `{name}` | {spec['dtype']} | {spec['shape']} |" for name, spec in facts["arrays"].items())
    size = next(name for limit, name in _SIZES if facts["groups"] < limit)
    return f"""---
pretty_name: datamerge artifact
license: other
size_categories:
- {size}
tags:
- adversarial-training
- datamerge
- {facts["format"]}
---

# Merged groups

{facts["groups"]} groups of {facts["members"]["min"]} to {facts["members"]["max"]} samples, each reduced to its
mean and mean square over pixels {facts["pixels"]} in [0, 1] (before any normalisation, divisor N).
{facts["shards"]} shards, {facts["bytes"]} bytes, format `{facts["format"]}`, encoding `{facts["encoding"]}`,
schema version {facts["schema_version"]}, written by {facts["writer"]}. The licence of the source applies.

| array | dtype | shape per group |
|---|---|---|
{arrays}

{_MOMENTS[facts["encoding"]]}.

## Load

```python
from storage_schemas import open_artifact
record = open_artifact(".")[0]      # record.mean, record.mean_square, record.variance, record.target, …
```

{_LOAD[facts["format"]]}

## Provenance

```json
{json.dumps({"source": source, **provenance}, indent=1)}
```
"""


_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10**12, "1M<n"),
)
