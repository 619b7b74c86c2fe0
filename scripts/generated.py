"""Parts of the guides that scripts make: printed, or put between their two markers."""

import argparse
from pathlib import Path

END = "<!-- end -->\n"


def print_or_write(about: str | None, document: Path, begin: str, text: str) -> None:
    """The command line of such a script: with --write the text replaces what stands in the document between `begin` and END."""
    options = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--write", action="store_true", help=f"put it into docs/{document.name}")
    if not options.parse_args().write:
        print(text, end="")
        return
    before, rest = document.read_text(encoding="utf-8").split(begin)
    document.write_text(before + begin + text + END + rest.split(END)[1], encoding="utf-8")
