"""The documented API of BioNeMo-SCDL over archives opened in place."""
