"""How fast, small and exact the library is beside its alternatives: `run.py` says how to run it."""
