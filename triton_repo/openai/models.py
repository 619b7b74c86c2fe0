"""The models of a repository, as far as the frontend has to know them: tokenizer, chat template, the model's own settings."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.runtime.errors import ServingError
from engines.runtime.manifest import read_manifest
from engines.runtime.text import Tokenizer
from ngpt.errors import ServerError
from triton_repo.openai.chat_template import ChatTemplate
from triton_repo.openai.errors import ApiError

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Model:
    """name: by which clients ask. served: Triton's name. generation: sampling settings of the checkpoint, under its names."""

    name: str
    served: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_length: int
    vocab_size: int
    generation: Mapping[str, float | bool]
    created: int = field(default_factory=lambda: int(time.time()))

    def encode(self, prompt: str | list[int], *, add_special_tokens: bool) -> list[int]:
        """A prompt's token ids; those that are given are held against the vocabulary. Raises ApiError."""
        if isinstance(prompt, str):
            try:
                self.tokenizer.check_length("prompt", prompt, self.max_length)
                prompt = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            except ServingError as error:
                raise ApiError(str(error), param="prompt") from error
        if not prompt or not all(0 <= token < self.vocab_size for token in prompt):
            raise ApiError(f"prompt: expected token ids from 0 to {self.vocab_size - 1}, at least one.", param="prompt")
        return prompt

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be a part of a character."""
        name = self.tokenizer.raw.id_to_token(token)
        if name is None:
            return b""
        if _BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        if token not in self._added and self._byte_level and all(letter in _letters() for letter in name):
            return bytes(_letters()[letter] for letter in name)
        return name.replace("▁", " ").encode("utf-8")

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.raw.get_added_tokens_decoder())

    @functools.cached_property
    def _byte_level(self) -> bool:
        decoder = self.tokenizer.raw.decoder
        return decoder is not None and b"ByteLevel" in bytes(decoder.__getstate__())


@functools.cache
def _letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes (GPT-2's table): those that print stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def open_models(repository: Path, *, chat_template: Path | None = None, name: str | None = None) -> dict[str, Model]:
    """The models with an engine and a tokenizer, by name; `name` is given to the only one. Raises ServerError, ConfigError."""
    found: dict[str, Model] = {}
    # By number: the newest version is the one that Triton answers with.
    paths = [path for path in repository.glob("*/*/engine/manifest.json") if path.parents[1].name.isdecimal()]
    for path in sorted(paths, key=lambda path: (path.parents[2].name, int(path.parents[1].name))):
        version = path.parents[1]
        served = version.parent.name
        if not (version / "tokenizer").is_dir():
            continue
        try:
            manifest = read_manifest(path.parent)
            tokenizer = Tokenizer.load(version / "tokenizer")
        except ServingError as error:
            raise ServerError(f"the model {served} cannot be read", found=str(error)) from error
        template = ChatTemplate.load(version / "tokenizer", chat_template)
        sizes = manifest.model.max_length, manifest.model.vocab_size
        found[served] = Model(served, served, tokenizer, template, *sizes, manifest.generation)
    if not found:
        raise ServerError(
            "no model that takes text",
            expected="a repository that `ngpt-deploy package` made of an engine with a tokenizer",
            found=str(repository),
        )
    if name is not None:
        if len(found) > 1:
            raise ServerError("--model-name", expected="a repository of one model", found=", ".join(found))
        (model,) = found.values()
        return {name: dataclasses.replace(model, name=name)}
    return found
