"""SCDL archives as sources that the loader reads."""
