"""The token sequences on which two runs are compared: random tokens and, with a tokenizer, real text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ngpt.checkpoint import Checkpoint, expected_tensors
from ngpt.errors import ConfigError, os_trouble, shown

TEXTS = (
    """def count_words(path, encoding="utf-8"):
    \"\"\"Return a dictionary of the words of a file and how often each occurs.\"\"\"
    found = {}
    with open(path, encoding=encoding) as file:
        for line in file:
            for word in line.split():
                found[word] = found.get(word, 0) + 1
    return found


class Counter:
    def __init__(self, name):
        self.name = name
""",
    "The largest planet in the solar system is Jupiter. It has more than ninety moons, and the four largest of them can be seen "
    "with a small telescope. Galileo found them in 1610. Because they do not go round the Earth, they were the first proof that",
)
_RANDOM_LENGTHS = (5, 33, 128)
DECODE_STEPS = 64
LARGE = 1 << 30
"""Parameters from which half as many steps are enough: every position costs the reference a step through all of them."""
TEXT_WINDOW, TEXT_STEPS = 512, 16
MOST_TEXT_BYTES, MOST_TEXT_TOKENS = 4 << 20, 16_384
_MOST_LOGITS = 1 << 29  # of all windows together: in float64 4 GB of scratch for each way of running the model
_POSITIONS = 100  # of random sequences together, or a model of very short context is judged by a handful of positions

Continue = Callable[[list[int], int], list[int]]
"""(prompt, steps) -> that many further tokens."""


@dataclass(frozen=True)
class TokenSequence:
    """Teacher-forced tokens: the first ``prompt_length`` are prefilled, the others decoded one by one. ``from_file``: of the text
    that was given."""

    name: str
    tokens: tuple[int, ...]
    prompt_length: int
    is_text: bool
    from_file: bool = False


def make_sequences(
    checkpoint: Checkpoint,
    prompts: Sequence[str | Sequence[int]] | None,
    *,
    max_length: int,
    decode_steps: int | None,
    seed: int,
    continue_greedily: Continue | None = None,
) -> list[TokenSequence]:
    """Sequences of prompt + ``decode_steps`` tokens, none longer than ``max_length``.

    Without a number of steps there are `DECODE_STEPS` (half as many for a model of `LARGE` parameters), or half of
    ``max_length`` where that is less: the other half is the
    prompt's. Given prompts (text, or token ids) are continued by ``continue_greedily``; without it their second half stands
    for what is decoded. By default there are three random-token sequences (more where the model's length is short), which
    visit directions that text never does, and two of text if the checkpoint has a tokenizer. Raises `ConfigError` for
    unusable prompts or lengths.
    """
    if max_length < 2:
        raise ConfigError(
            "the model's length",
            expected="2 tokens or more, to decode one after another",
            found=str(max_length),
            remedy="a model of one token generates nothing; build --no-verify makes its engine unverified",
        )
    if decode_steps is None:
        decode_steps = min(DECODE_STEPS if parameters(checkpoint) < LARGE else DECODE_STEPS // 2, max_length // 2)
    room = max_length - decode_steps
    if decode_steps < 1 or room < 1:
        raise ConfigError(
            "decode_steps",
            expected=f"1 to {max_length - 1} (the model's length is {max_length})",
            found=str(decode_steps),
            remedy="leave it out: the number then fits itself to the model",
        )
    vocabulary = checkpoint.spec.vocab_size
    sequences = []
    if prompts is None:
        random, tokens_with_direction = np.random.default_rng(seed), _with_direction(checkpoint)
        lengths = sorted({min(length, room) for length in _RANDOM_LENGTHS})
        more = _POSITIONS - sum(length + decode_steps for length in lengths)
        lengths += [lengths[-1]] * max(0, -(-more // (lengths[-1] + decode_steps)))
        for length in lengths:
            drawn = tokens_with_direction[random.integers(0, len(tokens_with_direction), length + decode_steps)]
            sequences.append(TokenSequence(f"random {length}", tuple(map(int, drawn)), length, is_text=False))
        prompts = TEXTS if checkpoint.text.tokenizer_file is not None else ()
    for number, prompt in enumerate(prompts):
        ids = (
            list(checkpoint.text.tokenizer().encode(prompt).ids) if isinstance(prompt, str) else [int(token) for token in prompt]
        )
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise ConfigError(
                f"parity prompt {number}",
                expected=f"at least one token id below {vocabulary}",
                found=shown(ids[:8]),
            )
        ids = ids[:room]
        is_text = isinstance(prompt, str)
        length = len(ids) if continue_greedily is not None else -(-len(ids) // 2)
        tokens = ids if continue_greedily is None else [*ids, *continue_greedily(ids, decode_steps)]
        sequences.append(TokenSequence(f"{'text' if is_text else 'tokens'} {number}", tuple(tokens), length, is_text))
    return sequences


def read_text(path: Path) -> str:
    """A file of text for `text_windows`, at most `MOST_TEXT_BYTES` of it. Raises ConfigError for one that is no UTF-8 text."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        found, remedy = os_trouble(error) if isinstance(error, OSError) else (str(error), "see whether the path is right")
        raise ConfigError(f"the text {path} cannot be read", found=found, remedy=remedy) from error
    cut = raw[:MOST_TEXT_BYTES]
    try:
        text = cut.decode("utf-8")
    except UnicodeDecodeError as error:
        # A letter may be divided where the rest was left off.
        if len(raw) <= MOST_TEXT_BYTES or error.start < len(cut) - 3:
            raise ConfigError(
                f"the text {path}", expected="UTF-8", found=f"another byte at {error.start}", remedy="convert it to UTF-8"
            ) from error
        text = cut[: error.start].decode("utf-8")
    if not text.strip():
        raise ConfigError(f"the text {path}", expected="some text", found="nothing but blanks")
    return text


def text_windows(checkpoint: Checkpoint, text: str, *, max_length: int, decode_steps: int | None) -> list[TokenSequence]:
    """A text in windows of at most `TEXT_WINDOW` tokens, each read anew; the last few tokens of each are decoded.

    No more than `MOST_TEXT_TOKENS` are taken, and fewer where the logits of so many would not fit (`_MOST_LOGITS`).
    Raises ConfigError where the checkpoint has no tokenizer, or the text has fewer than two tokens.
    """
    ids = checkpoint.text.tokenizer().encode(text).ids
    if len(ids) < 2:
        raise ConfigError("the text", expected="two tokens or more", found=f"{len(ids)}")
    window = min(TEXT_WINDOW, max_length)
    most = max(window, min(MOST_TEXT_TOKENS, _MOST_LOGITS // checkpoint.spec.vocab_size))
    ids = ids[:most]
    pieces = [ids[start : start + window] for start in range(0, len(ids), window)]
    steps = min(decode_steps or TEXT_STEPS, TEXT_STEPS)
    return [
        TokenSequence(f"window {number}", tuple(piece), max(1, len(piece) - steps), is_text=True, from_file=True)
        for number, piece in enumerate(pieces)
        if len(piece) > 1
    ]


def parameters(checkpoint: Checkpoint) -> int:
    """Numbers that the network has."""
    return sum(math.prod(expected.shape) for expected in expected_tensors(checkpoint.spec).values())


def _with_direction(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """The tokens whose embedding is not zero, or all if none is. The network divides by an embedding's norm, so that one of zero
    (padding of a vocabulary, which only --allow-off-sphere lets in) gives NaN here as there, and nothing to compare."""
    table = checkpoint.get("model.embed_tokens.weight")
    alive = np.flatnonzero(np.concatenate([block.ne(0).any(dim=1).numpy() for block in table.split(4096)]))
    return alive if len(alive) else np.arange(len(table))
