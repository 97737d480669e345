"""One block of a real model's width: what a layout, or prompts of regions, add to it."""
