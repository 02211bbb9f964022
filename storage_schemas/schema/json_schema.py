"""The JSON Schemas of the artifact's documents, shipped in `storage_schemas/schema/` for readers in any language.

`python -m storage_schemas.schema.json_schema` regenerates them from the models that parse the documents.
"""

from __future__ import annotations

import json
from pathlib import Path

from storage_schemas.schema.manifest import SCHEMA_VERSION, Commit, Manifest, Sealed

FOLDER = Path(__file__).parent
DOCUMENTS: dict[str, type[Sealed]] = {"manifest": Manifest, "commit": Commit}


def schemas() -> dict[str, str]:
    """The text of every schema of this version, by file name."""
    texts = {}
    for name, model in DOCUMENTS.items():
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **model.model_json_schema(mode="serialization"),
        }
        texts[f"{name}-{SCHEMA_VERSION}.schema.json"] = json.dumps(schema, indent=1) + "\n"
    return texts


if __name__ == "__main__":
    for name, text in schemas().items():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")
