"""Short programs a user would start from: `python -m dense_attn.examples.<name>`; and the demo's
layout, scene.png.
"""
