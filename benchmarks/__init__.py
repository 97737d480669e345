"""How fast, small and exact the library is beside what a user would pick instead; `run.py` says how
to run it.
"""
