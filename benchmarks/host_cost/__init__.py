"""What a call costs the host, from the public op to a bare launch."""
