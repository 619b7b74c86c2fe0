"""transformers' Auto classes know nGPT whichever package is imported first, and however far transformers has got by then."""

import subprocess
import sys

import pytest

import ngpt
from ngpt.errors import MissingPackageError
from tests.conftest import GOLDEN, ROOT

ORDERS = [
    "import ngpt; from transformers import AutoModelForCausalLM as Auto",
    "from transformers import AutoModelForCausalLM as Auto; import ngpt",
    "import ngpt.model; from transformers import AutoModelForCausalLM as Auto",
    # transformers loads its Auto classes while its own modeling_layers, which ours need, is halfway loaded.
    "import ngpt, transformers.models.llama.modeling_llama; from transformers import AutoModelForCausalLM as Auto",
    "import transformers.modeling_layers, ngpt; from transformers import AutoModelForCausalLM as Auto",
]


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_imports_registers(order):
    code = f"{order}; print(type(Auto.from_pretrained({str(GOLDEN / 'gqa')!r})).__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "ngpt.model\n", done.stderr


@pytest.mark.parametrize("version", ["4.57.6", "5.3.0"])
def test_an_older_transformers_is_left_alone_and_named_when_a_class_is_asked_for(version, monkeypatch):
    import transformers

    from ngpt.registration import register

    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(transformers.AutoConfig, "register", lambda *_, **__: pytest.fail("it was touched"))
    register()
    with pytest.raises(MissingPackageError, match=rf"transformers {version}.*pip install .*transformers"):
        _ = ngpt.NGPTForCausalLM


def test_what_is_not_there_is_not_there():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ngpt.nonsense
    assert {"NGPTConfig", "NGPTModel"} <= set(dir(ngpt))
