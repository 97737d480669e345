"""What every benchmark shares: the machine, clocks, checks, bars, tables and the header of a
run.
"""
