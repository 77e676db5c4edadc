"""Training: arguments, data, and (torch) the trainer; see docs/training.md."""
