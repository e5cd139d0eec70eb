"""Measurements that pair both sides of a comparison in one run."""
