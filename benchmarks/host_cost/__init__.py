"""A call's cost to the host, from the public op to a bare launch."""
