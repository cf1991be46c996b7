"""Queries over stores that lie where other programs wrote them: `hbx_gpu.open`."""
