"""`python -m dense_attn demo`: layout attention on a real layout, a table and a picture."""
