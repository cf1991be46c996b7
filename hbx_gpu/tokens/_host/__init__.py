"""The host engine: numba kernels that make the bits of the reference, one row at a time."""
