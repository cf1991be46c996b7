"""Damaged files of every kind, opened and read in processes with limits: `python -m tests.fuzzing`."""
