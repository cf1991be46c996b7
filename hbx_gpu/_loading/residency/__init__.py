"""Keep chunks in memory between batches: on the heap, in page-locked memory, or on the device."""
