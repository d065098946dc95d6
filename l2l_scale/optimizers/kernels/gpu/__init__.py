"""The GPU kernel in Triton. Nothing is imported here: only :mod:`kernel` and what it uses import triton."""
