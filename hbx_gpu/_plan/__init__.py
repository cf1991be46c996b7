"""From rows to the chunks to read and the pieces to copy. Pure functions without I/O."""
