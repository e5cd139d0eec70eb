"""What a training step needs, found out without training: memory, communication, arithmetic."""
