"""The numbers of a layout, and the pairs of tokens that it touches."""
