"""A prompt for each region of an image: what a user gives, how regions share, and the block."""
