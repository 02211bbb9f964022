"""File access through fsspec: locations, retries, a verified local cache, byte ranges."""
