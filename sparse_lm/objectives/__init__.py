"""Training objectives: (batch, apply) -> (loss, metrics)."""
