"""One operation per file: torch reference, CPU C path, later Triton; chosen by device.

Empty on purpose: transformers probes for a package called ``kernels`` when it runs from the repository's root, so
importing this must work and must do nothing.
"""
