"""From a dataset and an order to batches: `make_loader`, how windows are made, and the threads that do it."""
