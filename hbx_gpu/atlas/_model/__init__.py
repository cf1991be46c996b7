"""Schemas, pointer fields, feature spaces and columns of an atlas."""
