"""How a window of batches is made: on the host, on a device, or of several modalities."""
