"""Run the model's tests, and one build with parity, against the lowest and the newest library versions that pyproject.toml
allows.

    python scripts/matrix.py             # both legs
    python scripts/matrix.py newest      # one; part of CI, so that a release that breaks us is seen the day it appears

Each leg has an environment of its own under build/matrix, made anew each time: what the newest version is changes. torch is
pinned in both, to the version in constraints.txt: other builds of it are gigabytes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEGS = ["lowest", "newest"]
LIBRARIES = ("transformers", "onnxruntime")
TENSORRT_LLM = (
    "transformers==4.57.1",
    "huggingface_hub<1",
    "tokenizers==0.22.1",
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset-normalizer",
)
TESTING = ("pytest", "hypothesis", "accelerate")
TESTS = ("tests/ngpt",)
TARGET = "cpu-int8"


def requirement(library: str) -> str:
    """What pyproject.toml says of a library, such as "transformers>=5.4,<6"."""
    extras: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    return next(line for lines in extras.values() for line in lines if re.match(rf"{library}\b(?!-)", line))


def lowest(library: str) -> str:
    """The same, pinned to the lowest version allowed."""
    found = re.search(r">=\s*([0-9.]+)", requirement(library))
    if found is None:
        raise SystemExit(f"pyproject.toml: {requirement(library)!r} has no lower bound; write one, such as {library}>=1.0")
    return f"{library}=={found[1]}.*"


def pinned_torch() -> str:
    """The line of constraints.txt."""
    return next(
        line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.startswith("torch==")
    )


def run(*command: object) -> None:
    """Run a command from the root of the checkout, showing it. Raises CalledProcessError."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def leg(name: str) -> None:
    """Make the environment of a leg and run everything in it. Raises CalledProcessError when any of it fails."""
    folder = ROOT / "build" / "matrix" / name
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder / "env")
    python = folder / "env" / "bin" / "python"
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*install, pinned_torch())
    chosen = [lowest(library) if name == "lowest" else requirement(library) for library in LIBRARIES]
    run(*install, "--upgrade", "-e", ".[torch,onnx]", *chosen, *TESTING)
    versions = "; ".join(f"print('{library}', __import__('{library}').__version__)" for library in LIBRARIES)
    run(python, "-c", versions)
    run(python, "-m", "pytest", "-q", *TESTS)
    engine = folder / "engine"
    run(python, "-m", "scripts.cli", "build", "--checkpoint", "tests/golden/gqa", "--target", TARGET, "--output", engine)
    run(python, "-m", "scripts.cli", "inspect", engine)
    if name == "newest":
        # What TensorRT-LLM 1.2 and 1.3 pin, beside the environment: their configuration class must read every spelling.
        beside = folder / "transformers-4"
        run(*install, "--no-deps", "--target", beside, *TENSORRT_LLM)
        command = [
            "env",
            f"PYTHONPATH={beside}:{ROOT}",
            python,
            "-m",
            "pytest",
            "-q",
            "--noconftest",
            "tests/trtllm/test_rope_spellings.py",
        ]
        run(*command)
    shutil.rmtree(folder)  # gigabytes; a leg that failed is kept to be looked at


def main() -> int:
    """Run the legs that were asked for; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("leg", nargs="?", choices=LEGS, help="which to run; both if none is named")
    chosen = parser.parse_args().leg
    failed = []
    for name in LEGS if chosen is None else [chosen]:
        try:
            leg(name)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"the leg {name!r} failed: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
