"""TEST DOUBLE of the part of TensorRT-LLM 1.2's engine flow that this project calls, computing eagerly in torch on the CPU.

It is our reading of the public source, not TensorRT-LLM: signatures are the source's (each function names the file
and commit it was read at), meanings are the documented ones, and what the project does not use is absent, so a call
outside it fails. Wrong argument names, shapes and types fail too; TensorRT's own refusals, its kernels and its speed
are not modelled. Ranks are threads of one process that meet in their collectives (`world`).

    with installed():                 # puts it into sys.modules as `tensorrt_llm`
        from export.trtllm.model import NGPTForCausalLM
"""

import types
from contextlib import contextmanager

from tests.doubles.modules import swapped
from tests.doubles.tensorrt_llm_double import functional, layers, models, world

CLIENTS = ("export.trtllm.model", "export.trtllm.model_file")


@contextmanager
def installed():
    """`tensorrt_llm` in sys.modules; what imported it is dropped again at the end."""
    package = types.ModuleType("tensorrt_llm")
    package.__path__ = []
    package.__version__ = "1.2.1"
    modules = {
        "tensorrt_llm": package,
        "tensorrt_llm.functional": functional,
        "tensorrt_llm._common": _module(
            "tensorrt_llm._common", default_net=world.default_net, default_trtnet=world.default_trtnet
        ),
        "tensorrt_llm.layers": _module(
            "tensorrt_llm.layers", ColumnLinear=layers.Linear, RowLinear=layers.RowLinear, Embedding=layers.Embedding
        ),
        "tensorrt_llm.module": _module("tensorrt_llm.module", Module=layers.Module, ModuleList=layers.ModuleList),
        "tensorrt_llm.parameter": _module("tensorrt_llm.parameter", Parameter=layers.Parameter),
        "tensorrt_llm.models": _module("tensorrt_llm.models", MODEL_MAP=models.MODEL_MAP),
        "tensorrt_llm.models.modeling_utils": models,
    }
    package.functional = functional
    try:
        with swapped(modules, CLIENTS):
            yield
    finally:
        models.MODEL_MAP.clear()


def _module(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    return module
