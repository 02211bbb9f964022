"""Commands that make artifacts from artifacts, compare them, and take groups out."""
