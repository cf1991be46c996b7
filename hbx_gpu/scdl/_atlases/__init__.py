"""Conversion between SCDL archives and atlases."""
