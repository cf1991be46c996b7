"""Which chunks stay in memory between batches: on the heap, page-locked, or on the device."""
