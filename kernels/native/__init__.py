"""C sources of the CPU kernels, compiled by shoal.kernels.build."""
