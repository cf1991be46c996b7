"""Batches handed over through an NVIDIA DALI pipeline."""
