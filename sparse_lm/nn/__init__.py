"""Layers of the Transformer that know nothing of experts."""
