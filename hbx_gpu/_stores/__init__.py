"""Stores of other programs as they lie on disk: AnnData, MuData, annbatch, 10x Genomics and loom."""
