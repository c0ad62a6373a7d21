"""CUDA sources compiled at run time: what they share, and how they are launched."""
