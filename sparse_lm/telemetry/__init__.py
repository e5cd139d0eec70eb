"""Metrics, their sinks, progress and the report page."""
