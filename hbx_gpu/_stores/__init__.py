"""Stores of other programs, opened where they lie: AnnData, MuData, annbatch, 10x Genomics, loom, SCDL."""
