"""Who can run an op: the table of backends, the contract of raw ops, and one module for each
backend.
"""
