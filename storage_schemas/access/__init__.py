"""Files wherever fsspec reaches: locations, retries, a verified local cache, byte ranges."""
