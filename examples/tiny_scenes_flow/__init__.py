"""A flow model with joint attention, small enough to ship, on the scenes of tiny_scenes."""
