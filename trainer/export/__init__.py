"""Trained encoders for other programs."""
