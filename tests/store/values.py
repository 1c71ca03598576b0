"""Small blobs with known values."""

from meristem.testing.packs import mixed, tensor

__all__ = ["mixed", "tensor"]
