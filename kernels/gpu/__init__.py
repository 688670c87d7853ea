"""The Triton kernels, one operation per file; the public operations in shoal.kernels dispatch to them on GPUs.

Empty on purpose: importing a file of this package imports triton, which machines without a GPU need not have.
"""
