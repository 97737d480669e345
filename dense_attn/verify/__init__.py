"""`python -m dense_attn verify`: every available backend against the reference on this machine."""
