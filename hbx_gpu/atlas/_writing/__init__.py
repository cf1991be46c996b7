"""Writing zarr arrays of an atlas."""
