"""Corpora, synthetic languages, packing and loading."""
