"""Feeds, which make windows of batches: on the host, on a device, or of several modalities."""
