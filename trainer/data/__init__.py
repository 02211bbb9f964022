"""From stored records to batches: the order of groups, the stream, and the noise of a step."""
