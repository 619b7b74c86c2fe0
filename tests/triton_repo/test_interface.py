"""One table, and everything that is made from it: a row that one path knows and another does not is found here."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from engines.runtime import SamplingParams
from scripts import generated, interface_table
from tests.conftest import ROOT
from triton_repo import config_pbtxt, interface
from triton_repo.client import RequestRefused, token_tensors
from triton_repo.interface import (
    BACKEND,
    INPUTS,
    MODEL,
    NGPT,
    PYTORCH,
    REFUSED,
    TENSORRT_LLM,
    TEXT,
    TOKENS,
    WORD_LIST,
    Input,
    Tensor,
    declared,
    honoured,
    inputs,
    options,
)
from triton_repo.serving_inputs import NUMPY, InputError, option_array, parse_options, word_lists

DTYPE = model_config_pb2.DataType.Name
SETTINGS = config_pbtxt.Settings(
    num_slots=4,
    max_queue=9,
    prefill_chunk=64,
    threads=None,
    exclude_input=False,
    vocab_size=100,
    max_length=64,
    eos_token_ids=(2, 3),
    pad_token_id=None,
    engine_path="/models/e",
    kv_cache_fraction=0.9,
    text_instances=1,
)
CONFIGS = {
    MODEL: lambda: config_pbtxt.own_model("ensemble", SETTINGS),
    TOKENS: lambda: config_pbtxt.alias(SETTINGS),
    TEXT: lambda: config_pbtxt.text_model("tensorrt_llm_bls", SETTINGS),
    BACKEND: lambda: config_pbtxt.backend_model(SETTINGS),
    PYTORCH: config_pbtxt.pytorch_model,
}
REPOSITORIES = {
    "tensorrt_llm": CONFIGS[TOKENS],
    "ensemble": CONFIGS[MODEL],
    "preprocessing": lambda: config_pbtxt.preprocessing(SETTINGS),
    "postprocessing": lambda: config_pbtxt.postprocessing(SETTINGS),
    "backend": CONFIGS[BACKEND],
    "backend_ensemble": lambda: config_pbtxt.ensemble(SETTINGS),
    "pytorch": CONFIGS[PYTORCH],
}
VALUES = {"INT32": 1, "UINT64": 7, "FP32": 0.5, "BOOL": True}
SAMPLED = [row for row in INPUTS if row.sets and row.option in options(TOKENS)]


def parsed(text):
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def link(monkeypatch):
    """The bridge to TensorRT-LLM's backend, with a stand-in for Triton's Python module: its tensors are looked at, none is sent."""
    stand_in = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL=1)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    return template(monkeypatch, "trtllm_backend.link")


def template(monkeypatch, name):
    """A template's module, imported anew: with the rows that the table has now."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # a model puts its own folder first
    for module in ("shared.python_backend", name):
        monkeypatch.delitem(sys.modules, f"triton_repo.templates.{module}", raising=False)
    return importlib.import_module(f"triton_repo.templates.{name}")


@pytest.fixture
def rows(monkeypatch):
    """Puts further rows into the table."""

    def add(*more):
        monkeypatch.setattr(interface, "INPUTS", (*INPUTS, *more))

    return add


def test_every_row_that_sets_something_sets_a_field_of_the_sampler_and_every_field_is_set_by_a_row():
    fields = set(SamplingParams.option_names())
    assert {row.sets for row in INPUTS if row.sets} == fields - {"eos_token_ids"}  # which end_id sets


def test_options_have_one_name_and_tensors_of_one_interface_do_too():
    names = [row.option for row in INPUTS]
    assert len(names) == len(set(names))
    for kind in (MODEL, TOKENS, TEXT, BACKEND, PYTORCH):
        wire = [tensor.name for row in INPUTS for tensor in row.tensors(kind)]
        assert len(wire) == len(set(wire)) and set(wire) <= set(declared(kind))
    assert not {row.tensor.name for row in REFUSED} & {tensor.name for row in INPUTS for tensor in row.tensors(MODEL)}
    for row in options(TEXT).values():
        assert row.text is not None and row.text.dtype == row.dtype() and (row.tokens is None or row.tokens.dtype == row.dtype())


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_declare_the_rows_and_nothing_else(kind):
    config = parsed(CONFIGS[kind]())
    expected = declared(kind)
    assert [t.name for t in config.input] == list(dict.fromkeys(t.name for t in config.input))
    found = {t.name: Tensor(t.name, model_config_pb2.DataType.Name(t.data_type)[5:], tuple(t.dims)) for t in config.input}
    assert found == expected


@pytest.mark.parametrize("model", REPOSITORIES)
def test_clients_of_the_first_release_find_every_tensor_as_it_was(model):
    """tests/data/wire-0.1.json was read from the files of 0.1, which were written by hand. What came later must be optional."""
    before = json.loads((ROOT / "tests" / "data" / "wire-0.1.json").read_text(encoding="utf-8"))[model]
    config = parsed(REPOSITORIES[model]())
    now = {t.name: [DTYPE(t.data_type)[5:], list(t.dims)] + ["optional"] * t.optional for t in config.input}
    # What had to be sent may now be left out, where a model has a default or takes either of two.
    needed = (
        before["inputs"]
        if model not in ("ensemble", "tensorrt_llm")
        else {k: [*v[:2], "optional"] for k, v in before["inputs"].items()}
    )
    assert {name: now.get(name) for name in needed} == needed
    assert all(kind[2:] == ["optional"] for name, kind in now.items() if name not in before["inputs"])
    outputs = {t.name: [DTYPE(t.data_type)[5:], list(t.dims)] for t in config.output}
    assert {name: outputs.get(name) for name in before["outputs"]} == before["outputs"]


def test_no_input_is_declared_and_then_not_looked_at():
    """Each sets something, is limited to what is neutral, or is read by the models' own code."""
    by_hand = {"end_id", "pad_id"}  # one sets two fields; the other is taken and not used, as the guide says
    templates = ROOT / "triton_repo" / "templates"
    answer = (templates / "shared" / "answer.py").read_text(encoding="utf-8")
    for kind, model in ((MODEL, "engine/model.py"), (TEXT, "trtllm_backend/text.py")):
        code = (templates / model).read_text(encoding="utf-8") + answer
        for row in options(kind).values():
            read = f'wants("{row.option}"' in code
            assert row.sets or row.only or read or row.option in by_hand, f"{row.option} of {model} does nothing"
    ours = {row.option for row in INPUTS if row.tokens is not None or row.text is not None}
    own_code = {"prompt", "input_ids", "input_lengths", "bad_words", "stop_words", "stop"}
    own_code |= {"logit_bias_ids", "logit_bias_values", "guide_type", "guide"}  # as a further row of no single value would need
    assert ours - set(options(MODEL)) == own_code
    assert {row.option for row, tensor in inputs(TOKENS) if tensor.dims == WORD_LIST} == {"bad_words", "stop_words"}


def test_the_pytorch_runtimes_model_looks_at_every_input_that_it_declares(monkeypatch):
    link(monkeypatch)
    model = template(monkeypatch, "trtllm_pytorch.model")
    read = {tensor.name for _, tensor in model.SAMPLING} | {f"return_{name}" for name in model.EXTRAS}
    named = {"text_input", "stop", "streaming", "sampling_param_stop", "return_cumulative_logprob"}
    code = (ROOT / "triton_repo" / "templates" / "trtllm_pytorch" / "model.py").read_text(encoding="utf-8")
    assert all(f'(inputs, "{name}")' in code for name in named)
    assert {tensor.name for _, tensor in inputs(PYTORCH)} == read | named


@pytest.mark.parametrize("row", SAMPLED, ids=lambda row: row.option)
def test_a_value_reaches_the_sampler_from_both_models_and_the_client(row):
    value = VALUES[row.dtype()]
    for kind in (MODEL, TOKENS, TEXT):
        given = {row.option: value} | ({} if row.option == "max_tokens" else {"max_tokens": 5})
        tensors = {options(kind)[o].of(kind).name: option_array(options(kind)[o], o, v) for o, v in given.items()}
        sampling = parse_options(tensors, kind, 100).sampling
        assert sampling[row.sets] == value
        SamplingParams(**sampling)
    sent = token_tensors([1, 2], 5, (), (), {} if row.option == "max_tokens" else {row.option: value})
    assert sent[row.tokens.name].dtype == NUMPY[row.dtype()]


@pytest.mark.parametrize("row", [row for row in SAMPLED if not row.local], ids=lambda row: row.option)
def test_the_bridge_to_the_backend_sends_each_parameter_or_refuses_it_by_name(row, monkeypatch):
    bridge, value = link(monkeypatch), VALUES[row.dtype()]
    tensors = {"max_tokens": np.asarray([[5]]), row.text.name: np.asarray([[value]])}
    if not honoured(row, TENSORRT_LLM):
        with pytest.raises(InputError, match=f"^{row.text.name}: expected .*, found {value}.* has no such input"):
            parse_options(tensors, TEXT, 100, TENSORRT_LLM)
        with pytest.raises(ValueError, match=row.sets):
            bridge._tensors([1], {row.sets: value})
        neutral = {**tensors, row.text.name: np.asarray([[row.neutral]])}
        assert row.sets not in parse_options(neutral, TEXT, 100, TENSORRT_LLM).sampling
        return
    sampling = parse_options(tensors, TEXT, 100, TENSORRT_LLM).sampling
    sent = bridge._tensors([1], sampling)
    assert sent[row.backend.name] == np.asarray([[value]], NUMPY[row.dtype()])
    declared = {tensor.name: tensor for tensor in parsed(config_pbtxt.backend_model(SETTINGS)).input}
    assert set(sent) <= set(declared)


def test_the_bridge_sends_word_lists_and_end_tokens(monkeypatch):
    bridge = link(monkeypatch)
    sent = bridge._tensors([1], {"max_new_tokens": 3, "bad_sequences": [[4, 5]], "eos_token_ids": (2, 7)})
    assert sent["end_id"].item() == 2 and sent["stop_words_list"].tolist() == [[[7], [1]]]
    assert sent["bad_words_list"].tolist() == [[[4, 5], [2, -1]]]
    assert bridge._tensors([1], {"max_new_tokens": 3, "ignore_eos": True, "eos_token_ids": (2,)})["end_id"].item() == -1
    both = bridge._tensors([1], {"stop_sequences": [[4, 5]], "eos_token_ids": (2, 7)})
    assert both["stop_words_list"].tolist() == [[[4, 5, 7], [2, 3, -1]]]


def test_a_new_row_is_known_to_every_path_at_once(rows, monkeypatch):
    """What adding a parameter takes beside the sampler: the row. Half of a parameter cannot be added."""
    wire = Tensor("top_h", "FP32")
    row = Input("top_h", "a parameter that is not there", tokens=wire, text=wire, sets="top_h", neutral=0.0)
    rows(row)
    for kind in (TOKENS, TEXT):
        assert "top_h" in {t.name for t in parsed(CONFIGS[kind]()).input}
        sent = {options(kind)["max_tokens"].of(kind).name: np.asarray([[5]]), "top_h": np.asarray([[0.5]])}
        assert parse_options(sent, kind, 100).sampling["top_h"] == 0.5  # which the sampler refuses until it knows it
    with pytest.raises(TypeError, match="top_h"):
        SamplingParams(**parse_options(sent, TEXT, 100).sampling)
    assert token_tensors([1], 5, (), (), {"top_h": 0.5})["top_h"].item() == 0.5
    with pytest.raises(InputError, match="^top_h: .*has no such input"):
        parse_options(sent, TEXT, 100, TENSORRT_LLM)
    for kind in (BACKEND, PYTORCH):
        assert "top_h" not in {t.name for t in parsed(CONFIGS[kind]()).input}
    assert "top_h" not in {t.name for t in parsed(config_pbtxt.ensemble(SETTINGS)).input}
    monkeypatch.setattr(interface_table, "INPUTS", interface.INPUTS)
    assert "| `top_h` | `top_h` | `top_h` | FP32 [1] |" in interface_table.table()
    from scripts.cli import parser

    assert parser().parse_args(["generate", "x", "--top-h", "0.5"]).top_h == 0.5


def test_a_new_row_that_tensorrt_llm_has_too_reaches_each_of_its_runtimes(rows, monkeypatch):
    wire = Tensor("top_h", "FP32")
    theirs = Tensor("sampling_param_top_h", "FP32")
    rows(Input("top_h", "not there", tokens=wire, text=wire, backend=wire, pytorch=theirs, sets="top_h", neutral=0.0))
    sampling = parse_options({"max_tokens": np.asarray([[5]]), "top_h": np.asarray([[0.5]])}, TEXT, 100, TENSORRT_LLM).sampling
    assert link(monkeypatch)._tensors([1], sampling)["top_h"] == np.asarray([[0.5]], np.float32)
    for kind, name in ((BACKEND, "top_h"), (PYTORCH, "sampling_param_top_h")):
        assert name in {t.name for t in parsed(CONFIGS[kind]()).input}
    ensemble = parsed(config_pbtxt.ensemble(SETTINGS))
    assert "top_h" in {t.name for t in ensemble.input} and ensemble.ensemble_scheduling.step[1].input_map["top_h"] == "top_h"
    model = template(monkeypatch, "trtllm_pytorch.model")
    assert "sampling_param_top_h" in {tensor.name for _, tensor in model.SAMPLING}


def test_a_new_word_list_reaches_the_sampler_of_the_tokens_model(rows):
    rows(Input("start_words", "not there", tokens=Tensor("start_words_list", "INT32", WORD_LIST), sets="start_sequences"))
    found = word_lists({"start_words_list": np.asarray([[[4, 5], [2, -1]]])}, 100)
    assert found == {"start_sequences": ((4, 5),)}


def test_an_option_nobody_knows_is_refused_by_the_client():
    with pytest.raises(TypeError, match="unknown option top_n; known are .*min_p"):
        token_tensors([1], 5, (), (), {"top_n": 1})
    with pytest.raises(RequestRefused, match="min_p: expected 0 to 1, found 2"):
        token_tensors([1], 5, (), (), {"min_p": 2})


def test_our_own_engine_honours_every_row_but_those_of_the_pytorch_runtime_alone():
    others = {row.option for row in INPUTS if not honoured(row, NGPT)}
    assert others == {"best_of", "return_stop_reason", "return_cumulative_logprob"}
    assert {row.option for row in options(TEXT).values() if not honoured(row, TENSORRT_LLM)} == {"min_p", "top_logprobs"}


def test_the_guides_table_is_what_the_rows_say():
    text = interface_table.DOCUMENT.read_text(encoding="utf-8")
    found = text.split(interface_table.BEGIN)[1].split(generated.END)[0]
    assert found == interface_table.table(), "run: python scripts/interface_table.py --write"


def test_no_configuration_is_written_by_hand():
    assert not list((ROOT / "triton_repo").rglob("*.pbtxt"))
    assert json.loads(json.dumps(dataclasses.asdict(SETTINGS)))["engine_path"] == "/models/e"


@pytest.mark.parametrize("path", ["/моде ли", '/a"b', "/a\\b", "/${x}", "/日本"])
def test_a_path_reaches_the_backend_as_it_is(path):
    config = parsed(config_pbtxt.backend_model(dataclasses.replace(SETTINGS, engine_path=path)))
    assert config.parameters["gpt_model_path"].string_value == path
