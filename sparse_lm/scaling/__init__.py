"""Scaling laws: published ones, fits to measured runs, compute-optimal sizes, and ladders of runs to fit them to."""
