"""Layouts on diffusers' modular pipelines: their text encoder's block, and their guider."""
