"""Commands that inspect, verify, compare, convert, remerge and combine artifacts, and export groups."""
