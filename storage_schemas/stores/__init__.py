"""The physical formats of artifacts, by their names in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from storage_schemas.schema.manifest import Format, Layout
from storage_schemas.stores.base import Reader, ShardEncoder, Store
from storage_schemas.stores.webdataset import WebDatasetStore
from storage_schemas.stores.zarr import ZarrStore

STORES: Final[Mapping[Format, type[Store]]] = {"zarr": ZarrStore, "webdataset": WebDatasetStore}

__all__ = ["STORES", "Reader", "ShardEncoder", "Store", "store_of"]


def store_of(layout: Layout) -> Store:
    """The store of a layout's format."""
    return STORES[layout.format](layout)
