"""From the tensors of a Triton request to sampling options, the same for every model of the repository.

Copied into the model repository: NumPy is all it needs, and it knows nothing of Triton's Python API.
Names, dtypes and neutral values are those of the public TensorRT-LLM model repositories.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triton_repo.interface import MODEL, NGPT, REFUSED, TOKENS, WORD_LIST, Input, honoured, options
from triton_repo.interface import inputs as rows_of

Inputs = Mapping[str, NDArray[Any]]


class InputError(ValueError):
    """A request that cannot be served as asked; the message begins with the name of the tensor."""


NUMPY: dict[str, type[np.generic]] = {
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
    "BOOL": np.bool_,
    "STRING": np.object_,
}
"""NumPy's types by Triton's names."""


@dataclass(frozen=True)
class Options:
    """A checked request. ``sampling`` holds keyword arguments of ``SamplingParams``, neutral ones left out; ``given`` every
    option as sent."""

    sampling: dict[str, Any]
    given: dict[str, Any] = field(default_factory=dict)

    def wants(self, option: str, default: bool = False) -> bool:
        """Whether a Boolean option is on."""
        return bool(self.given.get(option, default))


def scalar(inputs: Inputs, name: str) -> Any:
    """The one value of an optional tensor as a Python number, or None when it was not sent."""
    if name not in inputs:
        return None
    array = np.asarray(inputs[name])
    if array.size != 1:
        raise InputError(f"{name}: expected one value, found shape {list(array.shape)}. Send one request per prompt.")
    value = array.reshape(-1)[0].item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{name}: expected a finite number, found {value}.")
    return value


def _named(inputs: Inputs, names: Sequence[str]) -> tuple[str, Any]:
    """The value that was sent under one of the names, and that name; the first name and None where none was."""
    found = [(name, value) for name in names if (value := scalar(inputs, name)) is not None]
    if not found:
        return names[0], None
    for name, value in found[1:]:
        if value != found[0][1]:
            raise InputError(f"{name}: expected one of {name} and {found[0][0]}, found both ({value}, {found[0][1]}).")
    return found[0]


def refuse_foreign(inputs: Inputs) -> None:
    """Raise InputError, by name, for what another server would do and this one does not."""
    for row in REFUSED:
        name = row.tensor.name
        if name not in inputs:
            continue
        values = np.asarray(inputs[name]).reshape(-1).tolist()
        asked = [
            value for value in values if (value.decode("utf-8", "replace") if isinstance(value, bytes) else value) != row.neutral
        ]
        if asked:
            expected = "nothing" if row.neutral in (None, "") else f"{row.neutral}, or nothing"
            raise InputError(f"{name}: expected {expected}, found {_shown(asked[0])}. {row.remedy}".rstrip())


def check_range(row: Input, name: str, value: Any) -> None:
    """Raise InputError, by the tensor's name, for a value of an input that makes sense to no server."""
    if row.range is not None and not row.range.holds(value):
        raise InputError(f"{name}: expected {row.range.said}, found {value}. {row.range.remedy}".rstrip())


def option_array(row: Input, name: str, value: Any) -> NDArray[Any]:
    """The tensor [1, 1] of an input, in its dtype. Raises InputError for a value that it cannot hold as it is, or out of
    range."""
    kind: np.dtype[Any] = np.dtype(NUMPY[row.dtype()])
    number: Any
    if kind.kind == "b":
        number, good, expected = value, isinstance(value, bool | np.bool_), "True or False"
    elif kind.kind == "f":
        number = math.nan
        with contextlib.suppress(OverflowError):  # an integer beyond the largest float
            if _is_integer(value) or isinstance(value, float | np.floating):
                number = float(value)
        limit = float(np.finfo(kind).max)
        good, expected = abs(number) <= limit and bool(np.float32(number)) == bool(number), "a finite number of 32 bits"
    else:
        low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
        number = operator.index(value) if _is_integer(value) else None
        good, expected = number is not None and low <= number <= high, f"a whole number from {max(low, -1)} to {high}"
    if not good:
        raise InputError(f"{name}: expected {expected}, found {_shown(value)}.")
    check_range(row, name, number)
    return np.asarray([[number]], kind)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _shown(value: object) -> str:
    try:
        return repr(value.item() if isinstance(value, np.generic) else value)[:80]
    except ValueError:  # an integer of more digits than Python spells
        return f"a value of type {type(value).__name__}"


def parse_options(inputs: Inputs, interface: str, vocab_size: int, engine: str = NGPT) -> Options:
    """Read and check every option of a request.

    Args:
        inputs: tensors by name, as sent.
        interface: ``MODEL``, ``TOKENS`` or ``TEXT``. To the first, no length means what fits.
        vocab_size: bound of ``end_id``.
        engine: whose engine it is for; what another one would not do is refused.

    Raises:
        InputError: a value is out of range, or asks for something that is not offered.
    """
    rows = options(interface)
    names: dict[str, str] = {}
    given: dict[str, Any] = {}
    for option, row in rows.items():
        names[option], value = _named(inputs, [tensor.name for tensor in row.tensors(interface)])
        if value is not None:
            given[option] = value

    def require(option: str, good: bool, expected: str, remedy: str = "") -> None:
        if not good:
            raise InputError(f"{names[option]}: expected {expected}, found {given.get(option)}. {remedy}".rstrip())

    sampling: dict[str, Any] = {}
    for row, tensor in rows_of(interface):
        if row.option not in rows and tensor.name in inputs and not honoured(row, engine):
            raise InputError(f"{tensor.name}: expected nothing, found a value. {engine} has no such input.")
    if interface != MODEL and "max_tokens" not in given:
        check_range(rows["max_tokens"], names["max_tokens"], 0)
    for option, value in given.items():
        row = rows[option]
        check_range(row, names[option], value)
        if row.only is not None:
            require(option, row.only.holds(value), row.only.said, row.only.remedy)
        if value != row.neutral and not honoured(row, engine):
            require(option, False, f"{row.neutral}, or nothing", f"{engine} has no such input.")
        if row.sets and value != row.neutral:
            sampling[row.sets] = value
    require("end_id", -1 <= given.get("end_id", -1) < vocab_size, f"a token id below {vocab_size}, or -1 for none")
    if (most := given.get("max_tokens")) is not None:
        require("min_tokens", given.get("min_tokens", 0) <= most, f"0 to {names['max_tokens']} ({most})")
    if given.get("end_id") == -1:
        sampling["ignore_eos"] = True
    elif "end_id" in given:
        sampling["eos_token_ids"] = (given["end_id"],)
    return Options(sampling, given)


def prompt_tokens(inputs: Inputs, vocab_size: int) -> list[int]:
    """``input_ids`` cut to ``input_lengths``, as a list of token ids.

    Raises:
        InputError: no tokens, a length beyond the tokens sent, several prompts, or an id outside the vocabulary.
    """
    ids = np.asarray(inputs.get("input_ids", np.zeros((1, 0), np.int32)))
    if ids.ndim > 1 and math.prod(ids.shape[:-1]) != 1:
        raise InputError(f"input_ids: expected one prompt, found shape {list(ids.shape)}. Send one request per prompt.")
    flat = ids.reshape(-1)
    length = scalar(inputs, "input_lengths")
    if length is not None:
        if not 1 <= length <= flat.size:
            raise InputError(f"input_lengths: expected 1 to {flat.size} (the tokens in input_ids), found {length}.")
        flat = flat[:length]
    if flat.size == 0:
        raise InputError("input_ids: expected at least one token, found none.")
    return check_ids("input_ids", flat.tolist(), vocab_size)


def check_ids(name: str, ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids, all of them in [0, vocab_size). Raises InputError."""
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InputError(f"{name}: expected token ids from 0 to {vocab_size - 1}, found {bad}.")
    return list(ids)


def check_room(name: str, prompt: int, new_name: str, new: int, max_length: int) -> None:
    """Prompt and new tokens must fit the cache together. ``name``, ``new_name``: the tensors to blame. Raises InputError."""
    if prompt >= max_length:
        raise InputError(f"{name}: the prompt is too long: expected at most {max_length - 1} tokens, found {prompt}. Shorten it.")
    if prompt + new > max_length:
        raise InputError(
            f"{new_name}: expected at most {max_length - prompt} after a prompt of {prompt} tokens, found {new}. "
            f"The engine holds {max_length} tokens."
        )


def text_of(inputs: Inputs, name: str) -> str:
    """One UTF-8 string. Raises InputError when it is absent, not alone, or not UTF-8."""
    if name not in inputs:
        raise InputError(f"{name}: expected a string, found nothing.")
    values = np.asarray(inputs[name]).reshape(-1)
    if values.size != 1:
        raise InputError(f"{name}: expected one string, found {values.size}. Send one request per prompt.")
    return _decode(name, values[0])


def words_of(inputs: Inputs, name: str) -> list[str]:
    """The strings of an optional word list; empty strings, which some clients send for "none", are left out."""
    if name not in inputs:
        return []
    return [word for value in np.asarray(inputs[name]).reshape(-1) if (word := _decode(name, value))]


def _decode(name: str, value: Any) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: expected UTF-8 text, found bytes that are not ({error.reason}).") from None


def word_lists(inputs: Inputs, vocab_size: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Every word list of token ids in a request, by the field of ``SamplingParams`` that it sets. Raises InputError."""
    lists = [(row.sets, tensor.name) for row, tensor in rows_of(TOKENS) if tensor.dims == WORD_LIST]
    return {sets: found for sets, name in lists if (found := sequences_of(inputs, name, vocab_size))}


def logit_bias(inputs: Inputs, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """Pairs of a token and what is added to its logit. Raises InputError for two lists that do not belong together, an id
    outside the vocabulary, or a number that is none."""
    names = ("logit_bias_ids", "logit_bias_values")
    ids, values = (np.asarray(inputs[name]).reshape(-1).tolist() if name in inputs else [] for name in names)
    if len(ids) != len(values):
        raise InputError(f"{names[1]}: expected one number for each of {len(ids)} tokens in {names[0]}, found {len(values)}.")
    if not all(map(math.isfinite, values)):
        raise InputError(f"{names[1]}: expected finite numbers, found {next(v for v in values if not math.isfinite(v))}.")
    return tuple(zip(check_ids(names[0], ids, vocab_size), values, strict=True))


def guide_of(inputs: Inputs) -> tuple[str, str] | None:
    """The kind and the text of what the answer is held to, or None. Raises InputError for a text without its kind."""
    kind, guide = "guided_decoding_guide_type", "guided_decoding_guide"
    if kind not in inputs:
        if guide in inputs and text_of(inputs, guide):
            raise InputError(f"{kind}: expected the kind of the guide, found nothing.")
        return None
    return text_of(inputs, kind), text_of(inputs, guide) if guide in inputs else ""


def sequences_of(inputs: Inputs, name: str, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """A word list INT32 [2, n] as token sequences: row 0 the ids one after another, row 1 where each ends, padded with -1.

    Raises:
        InputError: another shape, ends that do not rise or reach beyond the ids, ids outside the vocabulary.
    """
    if name not in inputs:
        return ()
    array = np.asarray(inputs[name])
    if array.size == 0:
        return ()
    if array.ndim < 2 or array.shape[-2] != 2 or int(np.prod(array.shape[:-2])) != 1:
        raise InputError(f"{name}: expected shape [2, n], found {list(array.shape)}.")
    ids, ends = array.reshape(2, -1).tolist()
    found: list[tuple[int, ...]] = []
    start = 0
    for end in ends:
        if end < 0:
            break
        if end == 0 and not any(later > 0 for later in ends):
            break  # all zeros: how some clients write an empty list
        if not start < end <= len(ids):
            raise InputError(f"{name}: expected rising ends of at most {len(ids)}, found {end} after {start}.")
        found.append(tuple(check_ids(name, ids[start:end], vocab_size)))
        start = end
    return tuple(found)


def sequences_array(sequences: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """The inverse of ``sequences_of``: INT32 [2, n], n at least 1."""
    ids = [token for sequence in sequences for token in sequence]
    ends = np.cumsum([len(sequence) for sequence in sequences], dtype=np.int64).tolist() if sequences else []
    width = max(len(ids), len(ends), 1)
    rows = [ids + [0] * (width - len(ids)), ends + [-1] * (width - len(ends))]
    return np.asarray(rows, dtype=np.int32)
