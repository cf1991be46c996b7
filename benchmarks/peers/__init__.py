"""One small program per loader of the comparison; each runs in an interpreter of its own."""
