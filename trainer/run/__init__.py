"""A training run: job, loop, update, checkpoints, validation, logs."""
