"""Triton kernels on a machine without a GPU: interpreted on the CPU, or compiled for a GPU and read."""
