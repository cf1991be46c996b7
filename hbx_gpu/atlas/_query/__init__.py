"""Queries of an atlas: conditions on obs, and the rows, sources and results that follow from them."""
