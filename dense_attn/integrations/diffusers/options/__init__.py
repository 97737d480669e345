"""What a layout's numbers are, and which pairs of tokens it touches."""
