"""The parts that benchmarks share: machine, clocks, checks, bars, tables, the header of results."""
