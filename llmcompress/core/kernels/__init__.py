"""Compiled row kernels: the inner loops that torch has no operation for, one file each."""
