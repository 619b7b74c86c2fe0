"""Sections of `make gpu-check`. Nothing here has been executed on a CUDA device yet; docs/measurements/METHOD.md says how to."""
