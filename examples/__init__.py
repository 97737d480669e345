"""Short programs to start from, `python -m dense_attn.examples.<name>`; scene.png is the demo's."""
