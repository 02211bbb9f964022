"""Commands that look at artifacts, check and compare them, make new ones of them, and take groups out."""
