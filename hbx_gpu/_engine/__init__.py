"""Engines turn a plan and the stored bytes of its chunks into rows; all engines return equal rows."""
