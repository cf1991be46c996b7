"""Datasets: rows of one or several modalities, planned, read and decoded batch by batch."""
