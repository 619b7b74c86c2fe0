"""Every config.pbtxt of a model repository, rendered from the request interface (`triton_repo.interface`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from triton_repo.interface import BACKEND, MODEL, PYTORCH, TEXT, TOKENS, Tensor, declared, inputs, outputs

DEFAULT_NAME = "ensemble"
_PARAMETER = re.compile(r'^parameters: { key: ("[^"]*"), value: { string_value: ("(?:[^"\\]|\\.)*") } }$', re.M)
DECOUPLED = "model_transaction_policy { decoupled: true }"
# What the text models and the tokens model hand to each other in a repository of TensorRT-LLM's layout.
_PREPROCESSING = (
    (Tensor("QUERY", "STRING"), "prompt", False),
    (Tensor("REQUEST_OUTPUT_LEN", "INT32"), "max_tokens", False),
    (Tensor("BAD_WORDS_DICT", "STRING", (-1,)), "bad_words", True),
    (Tensor("STOP_WORDS_DICT", "STRING", (-1,)), "stop_words", True),
    (Tensor("END_ID", "INT32"), "end_id", True),
    (Tensor("PAD_ID", "INT32"), "pad_id", True),
)
_PREPROCESSED = (
    (Tensor("INPUT_ID", "INT32", (-1,)), "input_ids"),
    (Tensor("REQUEST_INPUT_LEN", "INT32"), "input_lengths"),
    (Tensor("BAD_WORDS_IDS", "INT32", (2, -1)), "bad_words"),
    (Tensor("STOP_WORDS_IDS", "INT32", (2, -1)), "stop_words"),
    (Tensor("REQUEST_OUTPUT_LEN", "INT32", (-1,)), "max_tokens"),
    (Tensor("OUT_END_ID", "INT32"), "end_id"),
    (Tensor("OUT_PAD_ID", "INT32"), "pad_id"),
)
_POSTPROCESSING = (Tensor("TOKENS_BATCH", "INT32", (-1, -1)), Tensor("SEQUENCE_LENGTH", "INT32", (-1,)))
_POSTPROCESSED = Tensor("OUTPUT", "STRING", (-1,))
_TOKENS_MADE = ("output_ids", "sequence_length")
"""What the tokens model makes for postprocessing alone."""


@dataclass(frozen=True)
class Settings:
    """What a repository leaves open: numbers of the engine and choices of who packages it.

    name: of the model that holds the engine, which is `main` unless another is given; then the others are named after it.
    gpus: where each instance runs, none for the CPU or the runtime's own choice. engine_path, kv_cache_fraction: of
    TensorRT-LLM's backend. text_instances: of the text model beside it.
    """

    num_slots: int
    max_queue: int
    prefill_chunk: int
    threads: int | None
    exclude_input: bool
    vocab_size: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    engine_path: str
    kv_cache_fraction: float
    text_instances: int
    add_special_tokens: bool = True
    instances: int = 1
    gpus: tuple[int, ...] = ()
    main: str = DEFAULT_NAME
    name: str = DEFAULT_NAME

    @property
    def end_id(self) -> int:
        """The first token that ends a text; -1 where there is none."""
        return self.eos_token_ids[0] if self.eos_token_ids else -1

    def named(self, model: str) -> str:
        """The name under which one of the models is served."""
        if self.name == self.main:
            return model
        return self.name if model == self.main else f"{self.name}_{model}"


def own_model(name: str, settings: Settings) -> str:
    """This project's own engine, for text and for token ids."""
    return _python(
        name,
        [_tensor(tensor, optional=True) for tensor in declared(MODEL).values()],
        _outputs(MODEL),
        parameters={
            "num_slots": settings.num_slots,
            "max_queue": settings.max_queue,
            "prefill_chunk": settings.prefill_chunk,
            "threads": "" if settings.threads is None else settings.threads,
            "exclude_input_in_output": _bool(settings.exclude_input),
            "add_special_tokens": _bool(settings.add_special_tokens),
        },
        instances=_instances(settings.instances, settings.gpus),
    )


def alias(settings: Settings) -> str:
    """`tensorrt_llm`: the model above by the names of a tokens model, as a Triton ensemble of one step."""
    name = settings.named("tensorrt_llm")
    takes = declared(TOKENS)
    gives = [tensor for _, tensor in outputs(TOKENS)]
    tensors = [_tensor(tensor, optional=True) for tensor in takes.values()]
    head = _head(name, 'platform: "ensemble"', 1, tensors, [_tensor(tensor) for tensor in gives], decoupled=False)
    step = _step(settings.name, {key: key for key in takes}, {tensor.name: tensor.name for tensor in gives})
    return "\n".join([*head, "ensemble_scheduling {", "  step [", step, "  ]", "}", ""])


def text_model(name: str, settings: Settings) -> str:
    """Text in, text out, in Python: `tensorrt_llm_bls` beside TensorRT-LLM's backend."""
    return _python(
        name,
        _inputs(TEXT),
        _outputs(TEXT),
        parameters={
            "vocab_size": settings.vocab_size,
            "max_length": settings.max_length,
            "eos_token_ids": ",".join(map(str, settings.eos_token_ids)),
            "exclude_input_in_output": _bool(settings.exclude_input),
            "add_special_tokens": _bool(settings.add_special_tokens),
        },
        instances=_instances(settings.text_instances),
    )


def preprocessing(settings: Settings) -> str:
    """Text to token ids."""
    pad = settings.end_id if settings.pad_token_id is None else settings.pad_token_id
    return _python(
        settings.named("preprocessing"),
        [_tensor(tensor, optional=optional) for tensor, _, optional in _PREPROCESSING],
        [_tensor(tensor) for tensor, _ in _PREPROCESSED],
        parameters={"end_id": settings.end_id, "pad_id": pad, "add_special_tokens": _bool(settings.add_special_tokens)},
        decoupled=False,
    )


def postprocessing(settings: Settings) -> str:
    """Token ids to text."""
    return _python(
        settings.named("postprocessing"),
        [_tensor(tensor) for tensor in _POSTPROCESSING],
        [_tensor(_POSTPROCESSED)],
        parameters={"vocab_size": settings.vocab_size},
        decoupled=False,
    )


def pytorch_model() -> str:
    """`tensorrt_llm` around TensorRT-LLM's PyTorch runtime, with the interface of its llmapi model."""
    return _python("tensorrt_llm", _inputs(PYTORCH), _outputs(PYTORCH), batch=0)


def backend_model(settings: Settings) -> str:
    """`tensorrt_llm` in TensorRT-LLM's own backend.

    Rendered and parsed; not loaded by the backend. Names and parameters as read in NVIDIA/TensorRT-LLM at commit 0c8de69a,
    triton_backend/all_models/inflight_batcher_llm/tensorrt_llm; what this project does not offer is left out. What the
    backend reads is listed in triton_backend/inflight_batcher_llm/src/utils.h (commit 14c3afec): there is no min_p.
    """
    tensors = []
    for row, tensor in inputs(BACKEND):
        # One value loses its second dimension on the way in; lists of a batch may differ in length.
        shape = "reshape: { shape: [ ] }" if tensor.dims == (1,) else "allow_ragged_batch: true"
        tensors.append(_tensor(tensor, optional=not row.required, more=shape))
    return "\n".join(
        [
            *_head("tensorrt_llm", 'backend: "tensorrtllm"', settings.num_slots, tensors, _outputs(BACKEND), decoupled=True),
            "dynamic_batching {",
            f"  preferred_batch_size: [ {settings.num_slots} ]",
            f"  default_queue_policy: {{ max_queue_size: {settings.max_queue} }}",
            "}",
            *_parameters(
                {
                    "gpt_model_type": "inflight_fused_batching",
                    "gpt_model_path": settings.engine_path,
                    "batch_scheduler_policy": "guaranteed_no_evict",
                    "kv_cache_free_gpu_mem_fraction": settings.kv_cache_fraction,
                    "max_beam_width": 1,
                    "exclude_input_in_output": _bool(settings.exclude_input),
                    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
                }
            ),
            _instances(1),
            "",
        ]
    )


def ensemble(settings: Settings) -> str:
    """A Triton ensemble around the backend, as TensorRT-LLM's own repositories have it; `tensorrt_llm_bls` is the same in
    Python."""
    # An input of the ensemble that no step reads is an error, so it has those of the backend alone.
    ours = {row.option: (row, tensor) for row, tensor in inputs(TEXT) if row.option == "prompt" or row.backend is not None}
    theirs = {row.option: tensor for row, tensor in inputs(BACKEND)}
    made = {option: f"_{tensor.name}" for tensor, option in _PREPROCESSED}
    asked = {
        option: made[option] if option in made else ours[option][1].name for option in theirs if option in made or option in ours
    }
    hidden = {name: f"_{place.name}" for name, place in zip(_TOKENS_MADE, _POSTPROCESSING, strict=True)}
    passed = [tensor for _, tensor in outputs(BACKEND) if tensor.name not in hidden]
    steps = [
        _step(
            "preprocessing",
            {tensor.name: ours[option][1].name for tensor, option, _ in _PREPROCESSING},
            {tensor.name: f"_{tensor.name}" for tensor, _ in _PREPROCESSED},
        ),
        _step(
            "tensorrt_llm",
            {theirs[option].name: source for option, source in asked.items()},
            hidden | {tensor.name: tensor.name for tensor in passed},
        ),
        _step(
            "postprocessing", {tensor.name: f"_{tensor.name}" for tensor in _POSTPROCESSING}, {_POSTPROCESSED.name: "text_output"}
        ),
    ]
    tensors = [_tensor(tensor, optional=not row.required) for row, tensor in ours.values()]
    gives = [_tensor(tensor) for tensor in (Tensor("text_output", _POSTPROCESSED.dtype, _POSTPROCESSED.dims), *passed)]
    head = _head("ensemble", 'platform: "ensemble"', 1, tensors, gives, decoupled=False)
    return "\n".join([*head, "ensemble_scheduling {", "  step [", ",\n".join(steps), "  ]", "}", ""])


def _python(
    name: str,
    takes: Iterable[str],
    gives: Iterable[str],
    *,
    parameters: Mapping[str, object] | None = None,
    decoupled: bool = True,
    batch: int = 1,
    instances: str = "",
) -> str:
    head = _head(name, 'backend: "python"', batch, takes, gives, decoupled=decoupled)
    return "\n".join([*head, *_parameters(parameters or {}), instances or _instances(1), ""])


def _head(name: str, backend: str, batch: int, takes: Iterable[str], gives: Iterable[str], *, decoupled: bool) -> list[str]:
    lines = [f"name: {_quoted(name)}", backend, f"max_batch_size: {batch}", *([DECOUPLED] if decoupled else [])]
    for section, tensors in (("input", takes), ("output", gives)):
        lines += [f"{section} [", ",\n".join(f"  {tensor}" for tensor in tensors), "]"]
    return lines


def _inputs(interface: str) -> list[str]:
    # TensorRT-LLM's PyTorch runtime has a default length.
    needed = {
        tensor.name for row, tensor in inputs(interface) if row.required and (interface != PYTORCH or row.option == "prompt")
    }
    return [_tensor(tensor, optional=name not in needed) for name, tensor in declared(interface).items()]


def _outputs(interface: str) -> list[str]:
    return [_tensor(tensor) for _, tensor in outputs(interface)]


def _tensor(tensor: Tensor, *, optional: bool = False, more: str = "") -> str:
    parts = [
        f"name: {_quoted(tensor.name)}",
        f"data_type: TYPE_{tensor.dtype}",
        f"dims: [ {', '.join(map(str, tensor.dims))} ]",
    ]
    parts += ["optional: true"] * optional + [more] * bool(more)
    return "{ " + ", ".join(parts) + " }"


def parameters_of(config: str) -> dict[str, str]:
    """The parameters of a configuration that was rendered here, by name."""
    return {json.loads(key): json.loads(value) for key, value in _PARAMETER.findall(config)}


def _parameters(values: Mapping[str, object]) -> list[str]:
    return [
        f"parameters: {{ key: {_quoted(key)}, value: {{ string_value: {_quoted(str(value))} }} }}"
        for key, value in values.items()
    ]


def _instances(count: int, gpus: tuple[int, ...] = ()) -> str:
    """On GPUs, `count` on each of them."""
    where = f"KIND_GPU, gpus: [ {', '.join(map(str, gpus))} ]" if gpus else "KIND_CPU"
    return f"instance_group [ {{ count: {count}, kind: {where} }} ]"


def _step(model: str, takes: Mapping[str, str], gives: Mapping[str, str]) -> str:
    maps = [
        f'      {kind} {{ key: "{key}", value: "{value}" }}'
        for kind, table in (("input_map", takes), ("output_map", gives))
        for key, value in table.items()
    ]
    return "\n".join(["    {", f'      model_name: "{model}"', "      model_version: -1", *maps, "    }"])


def _quoted(text: str) -> str:
    """As the text format of protobuf, which reads JSON's escapes, quotes it."""
    return json.dumps(text, ensure_ascii=False)


def _bool(value: bool) -> str:
    return str(value).lower()
