"""Adapters for training frameworks, one module for each; a framework is imported only with its module.

The adapters hold no logic of data: they call samplers, datasets and :func:`hbx_gpu.dataloader.make_loader`.
"""
