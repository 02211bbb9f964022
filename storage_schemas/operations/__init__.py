"""Artifacts made from artifacts: convert, remerge, combine, diff, export."""
