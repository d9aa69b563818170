"""Sweep the tiles of the kernels' tables on this GPU, and propose rows."""
