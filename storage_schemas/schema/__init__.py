"""The documents and values of the format: manifest, record, moments, factors, run."""
