"""What the models have in common."""
