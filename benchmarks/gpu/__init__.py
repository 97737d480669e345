"""The first questions to a GPU: do the kernels run, are they right, which configuration is fast."""
