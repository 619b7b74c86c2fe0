"""A checkpoint's tokenizer and generation files: which there are, whether they fit the model, and at which tokens text ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt.checks import is_whole, whole
from ngpt.errors import CheckpointError, ConfigError, CorruptFileError, MissingPackageError, shown
from ngpt.files import MAX_CONFIG_BYTES, contained, exists, kind_of, not_there, read_json

TOKENIZER_FILE, TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERATION_CONFIG, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
)
MAX_GROWTH = 64  # published tokenizers replace one character by one to three
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 256 << 20  # as the serving side reads it (engines.runtime.text)
_SIDE_FILES = (TOKENIZER_CONFIG, SPECIAL_TOKENS, "added_tokens.json")
_NUMBER = re.compile(r"-?[0-9]{1,20}")
_SLOW_FILES = ("vocab.json", "merges.txt", "tokenizer.model")
# What tokenizers without a configuration call the end of a text; GPT-2's published files are such.
_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_SAMPLES = ("The largest planet in the solar system is", "def read(path):\n    return 1\n", "äöü 日本語 0123456789")
# Sampling settings of generation_config.json, the types they may have, and bounds.
_SAMPLING: dict[str, tuple[Any, float, float]] = {
    "do_sample": (bool, 0, 1),
    "temperature": ((int, float), 0, 1e6),
    "top_k": (int, 0, 1 << 31),
    "top_p": ((int, float), 0, 1),
    "min_p": ((int, float), 0, 1),
    "typical_p": ((int, float), 0, 1),
    "repetition_penalty": ((int, float), 0, 1e6),
    "no_repeat_ngram_size": (int, 0, 1 << 31),
    "max_new_tokens": (int, 0, 1 << 31),
    "min_new_tokens": (int, 0, 1 << 31),
}

End = int | str
"""A token at which text ends: its id, or its text in the tokenizer."""


class TextFiles:
    """``files``: name in an engine's or a converted folder to the file that goes there. ``ends``: the ids at which text ends, and
    ``sampling``: the settings that generation_config.json states. ``notes`` says in sentences what is unusual."""

    def __init__(self, files: Mapping[str, Path] | None = None) -> None:
        self.files: dict[str, Path] = dict(files or {})
        self.notes: tuple[str, ...] = ()
        self.sampling: dict[str, Any] = {}
        self.ends: tuple[int, ...] = ()
        self._ends_given = False
        self._tokenizer: Any = None

    @property
    def tokenizer_file(self) -> Path | None:
        """tokenizer.json, if there is one."""
        return self.files.get(TOKENIZER_FILE)

    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`, loaded once. Raises `ConfigError` without one, `CorruptFileError`,
        `MissingPackageError`."""
        if self.tokenizer_file is None:
            raise ConfigError(
                "text needs a tokenizer", expected=f"{TOKENIZER_FILE} beside the weights", remedy="give one with --tokenizer"
            )
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_file)
        return self._tokenizer

    def settle(
        self, config_ends: Sequence[int], vocab_size: int, *, ends: Sequence[End] = (), from_tokenizer: bool = False
    ) -> None:
        """Decide `ends` and read `sampling`.

        ``ends`` that were given count alone. Otherwise they are those of generation_config.json, as in transformers'
        `generate`, or where it does not speak of them those of the configuration; ``from_tokenizer`` allows, where
        there are none (a research checkpoint has neither file), what the tokenizer names as the end. Raises
        `ConfigError`, for ids that a model with so large a vocabulary does not have as well, `CorruptFileError`.
        """
        where = "config.json"
        generation = _read_object(self.files[GENERATION_CONFIG]) if GENERATION_CONFIG in self.files else {}
        self.sampling = _sampling(generation)
        if ends:
            self.ends, self._ends_given, where = tuple(dict.fromkeys(self._id(end) for end in ends)), True, "--eos"
        elif "eos_token_id" in generation:
            where = GENERATION_CONFIG
            self.ends = _ids(generation["eos_token_id"], f"{where}: eos_token_id")
        else:
            self.ends = tuple(config_ends)
            if from_tokenizer and not self.ends and self.tokenizer_file is not None:
                self.ends, self._ends_given, where = self._named_by_tokenizer(), True, "the tokenizer"
        for end in self.ends:
            if not 0 <= end < vocab_size:
                raise ConfigError(
                    f"{where}: eos_token_id" if where == GENERATION_CONFIG else f"the token that ends a text, from {where}",
                    expected=f"an id from 0 to {vocab_size - 1}, as the model has",
                    found=shown(end),
                    remedy="give the tokenizer that the model was trained with (--tokenizer)"
                    if where == "the tokenizer"
                    else f"correct {where}",
                )
        if not self.ends:
            self.notes += ("no token is known to end a text, so answers run to their limit; name one with --eos",)
        if self.tokenizer_file is None and (slow := [name for name in _SLOW_FILES if name in self.files]):
            self.notes += (
                f"there is no {TOKENIZER_FILE} ({', '.join(slow)} alone are not read): the engine takes and gives token ids; "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes one, "
                "--tokenizer FOLDER adds it",
            )

    def check(self, vocab_size: int) -> None:
        """Load the tokenizer, if there is one, and hold its ids against the model's table.

        Raises `CorruptFileError` for files that cannot be read, `ConfigError` for ids that the model does not have.
        """
        side = {name: _read_object(self.files[name]) for name in _SIDE_FILES if name in self.files}
        for name, token in _added_tokens(side):
            if token >= vocab_size:
                raise _beyond(self.files[name], vocab_size, token)
        if self.tokenizer_file is None:
            return
        tokenizer = self.tokenizer()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        highest = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
        encoded = [_encode(tokenizer, text, self.tokenizer_file) for text in _SAMPLES]
        if not vocabulary or not any(encoded):
            raise CorruptFileError(
                f"{self.tokenizer_file} turns text into nothing",
                expected="a tokenizer that knows some text",
                found=f"{len(vocabulary)} tokens",
                remedy="use the tokenizer that the model was trained with",
            )
        most = max(highest[1], *(token for ids in encoded for token in ids))
        if most >= vocab_size:
            count = sum(token >= vocab_size for token in vocabulary.values())
            raise _beyond(self.tokenizer_file, vocab_size, most, max(count, 1), highest[0] if highest[1] == most else None)
        _check_added(self.tokenizer_file, tokenizer, vocab_size)

    def copy_to(self, folder: Path) -> None:
        """Write the files into a folder, as they are but for two things.

        They are a tokenizer class that only transformers 5 knows, and ends that were given or found by `settle`, which
        generation_config.json must then state.
        """
        for name, path in self.files.items():
            value = None
            if name == TOKENIZER_CONFIG:
                value = for_every_transformers(_read_object(path))
            elif name == GENERATION_CONFIG and self._ends_given:
                value = _read_object(path) | {"eos_token_id": list(self.ends)}
            if value is None:
                shutil.copyfile(path, folder / name)
                _strip_mark(folder / name)
            else:
                text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
                (folder / name).write_text(text, encoding="utf-8")

    @property
    def ends_given(self) -> bool:
        """Whether the ends come from elsewhere than the checkpoint's own configurations, which must then be told."""
        return self._ends_given

    def _id(self, end: End) -> int:
        if isinstance(end, int) or _NUMBER.fullmatch(end):
            return int(end)
        tokenizer = self.tokenizer()
        found = tokenizer.token_to_id(end) if _is_text(end) else None
        if found is None:
            raise ConfigError(
                "the token that ends a text",
                expected="a token of the tokenizer, or an id",
                found=shown(end),
                remedy="correct --eos",
            )
        return int(found)

    def _named_by_tokenizer(self) -> tuple[int, ...]:
        """The id of the end token that the tokenizer's files name; without a configuration, its one special token."""
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            if name not in self.files:
                continue
            token = _read_object(self.files[name]).get("eos_token")
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                found = self.tokenizer().token_to_id(text) if _is_text(text) else None
                if found is not None:
                    return (int(found),)
                self.notes += (f"{name} names {shown(text)} as the end of a text, which {TOKENIZER_FILE} does not have",)
        special = {token.content: at for at, token in self.tokenizer().get_added_tokens_decoder().items() if token.special}
        usual = [text for text in _USUAL_ENDS if text in special]
        if len(usual) == 1 and len(special) == 1:
            self.notes += (f"text ends at {usual[0]}, the tokenizer's only special token; --eos names another",)
            return (int(special[usual[0]]),)
        return ()


def find_text_files(folder: Path, tokenizer: str | os.PathLike[str] | None = None) -> TextFiles:
    """The files beside a checkpoint's weights.

    With ``tokenizer``, a folder or a tokenizer.json, that one's are taken in place of the folder's. Raises `CheckpointError`
    where something else stands in a file's place, or ``tokenizer`` has none.
    """
    files = {name: _text_file(folder, name) for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if exists(folder, name)}
    if tokenizer is None:
        return TextFiles(files)
    files = {name: path for name, path in files.items() if name == GENERATION_CONFIG}
    return TextFiles(files | given_tokenizer(tokenizer))


def given_tokenizer(tokenizer: str | os.PathLike[str]) -> dict[str, Path]:
    """The tokenizer files of a folder, or a single tokenizer.json whatever it is called. Raises `CheckpointError`."""
    path = Path(tokenizer)
    kind = kind_of(path)
    if kind == "nothing":
        raise not_there(path, os.fspath(tokenizer), what="tokenizer", expected=f"a folder or a {TOKENIZER_FILE}")
    if kind == "file":
        return {TOKENIZER_FILE: _text_file(path.parent, path.name)}
    files = {name: _text_file(path, name) for name in TOKENIZER_FILES if kind == "folder" and exists(path, name)}
    if TOKENIZER_FILE not in files:
        raise CheckpointError(
            f"{path} holds no tokenizer",
            expected=TOKENIZER_FILE,
            found=", ".join(files) or "no tokenizer files",
            remedy="write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
        )
    return files


def given_chat_template(file: str | os.PathLike[str]) -> Path:
    """A file with a chat template. Raises `CheckpointError` where there is none, `CorruptFileError` for one that is too large or
    no text."""
    path = Path(file)
    if kind_of(path) != "file":
        raise not_there(path, os.fspath(file), what="chat template", expected="a file with a jinja2 template")
    with path.open("rb") as opened:
        data = opened.read(MAX_TEMPLATE_BYTES + 1)
    with contextlib.suppress(UnicodeDecodeError):
        if len(data) <= MAX_TEMPLATE_BYTES and data.decode("utf-8").strip():
            return path
    raise CorruptFileError(f"{path} is no chat template", expected=f"a text in UTF-8 of at most {MAX_TEMPLATE_BYTES} bytes")


def _text_file(folder: Path, name: str) -> Path:
    """`contained`, of a size that can be copied and loaded."""
    path = contained(folder, name)
    if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
        raise CorruptFileError(
            f"{path} is too large",
            expected=f"at most {MAX_TOKENIZER_BYTES} bytes",
            found=f"{size}",
            remedy="use the tokenizer that the model was trained with",
        )
    return path


def load_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file. Raises `CorruptFileError`, `MissingPackageError`."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingPackageError("reading a tokenizer needs the package tokenizers", remedy="pip install tokenizers") from error
    with _library_errors(
        f"{path} is no tokenizer", "a tokenizer.json of the tokenizers library", "copy or download the file again"
    ):
        tokenizer = Tokenizer.from_str(path.read_bytes().decode("utf-8-sig"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if (growth := _growth(tokenizer.normalizer)) > MAX_GROWTH:
        raise CorruptFileError(
            f"{path} makes a text longer before it divides it",
            expected=f"at most {MAX_GROWTH} times",
            found=f"{growth:.3g} times",
            remedy="use the tokenizer that the model was trained with",
        )
    return tokenizer


def _growth(normalizer: Any) -> float:
    """How many times longer the Replace steps of a normalizer may make a text: a chain of them grows it without bound."""
    state = json.loads(normalizer.__getstate__()) if normalizer is not None else {}
    steps, growth = [state], 1.0
    while steps:
        step = steps.pop()
        steps += step.get("normalizers", [])
        if step.get("type") == "Replace":
            matched = len(step["pattern"].get("String", "")) or 1
            growth *= max(1.0, len(step["content"]) / matched)
    return growth


def _encode(tokenizer: Any, text: str, path: Path) -> list[int]:
    with _library_errors(f"{path} cannot encode {shown(text)}", "", "use the tokenizer that the model was trained with"):
        return list(tokenizer.encode(text).ids)


@contextlib.contextmanager
def _library_errors(what: str, expected: str, remedy: str) -> Iterator[None]:
    """`CorruptFileError` for what the tokenizers library raises: bare Exception, and a PanicException that is not even that."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise CorruptFileError(what, expected=expected, found=" ".join(str(error).split())[:200], remedy=remedy) from error


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path, limit=MAX_CONFIG_BYTES)
    if not isinstance(value, dict):
        raise CorruptFileError(
            f"{path}", expected="a JSON object", found=type(value).__name__, remedy="copy or download the file again"
        )
    return value


def _beyond(path: Path, vocab_size: int, most: int, count: int = 1, text: str | None = None) -> ConfigError:
    return ConfigError(
        f"{path} has token ids that the model's embedding table lacks",
        expected=f"ids below vocab_size ({vocab_size})",
        found=f"{count} above, up to {most}" + (f" for {shown(text)}" if text is not None else ""),
        remedy="use the tokenizer that the model was trained with, or resize the model's vocabulary (resize_token_embeddings)",
    )


def _added_tokens(side: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, int]]:
    """(file, id) of what transformers' own files add to the vocabulary; entries that transformers refuses are left to it."""
    for token in side.get("added_tokens.json", {}).values():
        if is_whole(token):
            yield "added_tokens.json", token
    decoder = side.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    for key in decoder if isinstance(decoder, dict) else ():
        if key.isascii() and key.isdecimal() and len(key) < 20:
            yield TOKENIZER_CONFIG, int(key)


def _check_added(path: Path, tokenizer: Any, vocab_size: int) -> None:
    """The library gives an added token the next free id, whatever the file says: text would be other tokens than in training."""
    for entry in json.loads(path.read_bytes().decode("utf-8-sig")).get("added_tokens") or ():
        given = tokenizer.token_to_id(entry["content"])
        if entry["id"] >= vocab_size:
            raise _beyond(path, vocab_size, entry["id"], text=entry["content"])
        if given != entry["id"]:
            raise CorruptFileError(
                f"{path}: the added token {shown(entry['content'])}",
                expected=f"the id {given}, the next free one",
                found=f"{entry['id']}",
                remedy="use the tokenizer that the model was trained with",
            )


def _strip_mark(path: Path) -> None:
    """A byte-order mark is passed over here, but neither transformers nor the tokenizers library reads JSON with one."""
    with path.open("rb") as file:
        marked = file.read(3) == b"\xef\xbb\xbf"
    if marked:
        path.write_bytes(path.read_bytes()[3:])


def _is_text(text: str) -> bool:
    """Whether it is Unicode: JSON and command lines can hold lone surrogates, at which the tokenizers library raises."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """Token ids as transformers takes them: one, a list, or none; a negative one never comes and is left out."""
    ids: list[Any] = [whole(each) for each in (value if isinstance(value, list) else [] if value is None else [value])]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise ConfigError(where, expected="a token id, a list of them, or null", found=shown(value), remedy="correct the file")
    return tuple(dict.fromkeys(token for token in ids if token >= 0))


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are stated. Raises `ConfigError` for a wrong type or an impossible value."""
    found = {}
    for key, (kind, low, high) in _SAMPLING.items():
        value: Any = whole(generation.get(key)) if kind is int else generation.get(key)
        if value is None:
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not low <= value <= high:
            wanted = "true or false" if kind is bool else f"a number from {low:g} to {high:g}"
            raise ConfigError(f"{GENERATION_CONFIG}: {key}", expected=wanted, found=shown(value), remedy="correct the file")
        found[key] = value
    return found


def for_every_transformers(config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration under names that transformers 4 knows as well, or None if it needs no change.

    transformers 5 writes the class TokenizersBackend and a list of extra_special_tokens; 4.57, which TensorRT-LLM
    pins, refuses both. Both versions read what is written here.
    """
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list) and "additional_special_tokens" not in changed:
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed if changed != config else None
