"""Inferences that prove that a server works: one that calls itself ready may have a model that has crashed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

Probe = Callable[[str], object]
"""Called with ``host:port`` of the gRPC endpoint; must run one real inference and raise if it fails."""


def default_probe(repository: Path) -> Probe:
    """A probe for a repository made by ``package_engine``: one token of every engine in it, through text where there is a
    tokenizer."""
    from triton_repo.client import generate_text, generate_tokens

    own = sorted({path.parents[2].name for path in repository.glob("*/*/engine/manifest.json")} - {"tensorrt_llm"})
    models = own or ["ensemble" if (repository / "ensemble").is_dir() else "tensorrt_llm"]

    def probe(url: str) -> None:
        for model in models:
            if model != "tensorrt_llm" and (own == [] or any((repository / model).glob("*/tokenizer"))):
                generate_text(url, "a", max_tokens=1, timeout=30.0, model=model)
            else:
                generate_tokens(url, [0], max_tokens=1, timeout=30.0, model=model)

    return probe


class Asked:
    """A probe in a thread of its own, so that whoever waits for it can look at other things."""

    def __init__(self, probe: Probe, url: str) -> None:
        self.ended = False
        self.error: Exception | None = None
        self._probe, self._url = probe, url
        threading.Thread(target=self._run, name="probe", daemon=True).start()

    def _run(self) -> None:
        try:
            self._probe(self._url)
        except Exception as error:  # whatever went wrong is reported by who waits, if it lasts
            self.error = error
        self.ended = True
