"""How fast, small and exact layout attention is beside what a user would pick instead; `run.py` says how to run it."""
