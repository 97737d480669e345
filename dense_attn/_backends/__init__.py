"""The table of backends, the contract of raw ops, and one module for each backend."""
