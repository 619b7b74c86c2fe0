"""Load, faults and hostile input against a real server: see scripts/soak.py."""
