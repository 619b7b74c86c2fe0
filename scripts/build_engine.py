#!/usr/bin/env python3
"""Build an engine: python scripts/build_engine.py --checkpoint DIR --target NAME --output DIR (same as `ngpt-deploy build`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.cli import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
