"""Engines turn a plan and the bytes it names into rows; all of them give the same answer."""
