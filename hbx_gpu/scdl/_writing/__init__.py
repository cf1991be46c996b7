"""Writing, concatenating and converting SCDL archives atomically."""
