"""Functions of libraries in the place of kernels, where a plan names them."""
