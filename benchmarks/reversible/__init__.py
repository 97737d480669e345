"""Reversible DDIM: steps, chains, gradients and round trips."""
