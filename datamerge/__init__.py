"""Precompute adversarial groups once, train on their moments."""
