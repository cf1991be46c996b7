"""Transforms of image tiles through DALI: crop, flip, rotate, resize, change colors and normalize.

Importing this package imports neither DALI nor torch; making a pipeline does.
"""

from __future__ import annotations

from hbx_gpu.images._collate import TileCollate
from hbx_gpu.images._dali import ImagePipeline
from hbx_gpu.images._decode import decode_images
from hbx_gpu.images._transform import ImageTransform

__all__ = ["ImagePipeline", "ImageTransform", "TileCollate", "decode_images"]
