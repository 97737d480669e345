"""Percentiles and steps of semantic guidance beside their alternatives."""
