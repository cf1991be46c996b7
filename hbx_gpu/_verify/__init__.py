"""`hbx-gpu verify`: whether what is stored is whole, and which datasets are damaged."""
