"""This project's own models."""
