"""Timings against peers: `python -m bench.kernels`, `bench.step`, `bench.data`."""
