"""The words of an atlas: schemas, pointer fields, feature spaces and columns."""
