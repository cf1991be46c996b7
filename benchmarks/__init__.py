"""Measurements behind the project's published figures; each module runs with ``python -m``."""
