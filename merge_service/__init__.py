"""From raw images to an artifact: plan shards, make groups, store their moments."""

from merge_service.config import MergeConfig
from merge_service.merge import MergeResult, merge

__all__ = ["MergeConfig", "MergeResult", "merge"]
