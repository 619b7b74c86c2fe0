"""The class for TensorRT-LLM's PyTorch flow, against golden data on a double of its API."""

import importlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

from ngpt.checkpoint import open_checkpoint, save_hf
from ngpt.errors import MissingPackageError, ShapeError, UnsupportedError
from ngpt.spec import NGPTSpec
from tests.conftest import GOLDEN, ROOT, Golden
from tests.doubles import trtllm_torch
from tests.doubles.tensorrt_llm_double.layers import Mapping
from tests.doubles.tensorrt_llm_double.world import World
from tests.export.test_variants import VARIANTS, Case
from tests.trtllm.test_network import LOGIT_ERROR


class Engine:
    """Ranks of the class that the registry names, loaded from a folder, stepped over packed requests."""

    def __init__(self, folder, tp=1, pp=1, dtype=torch.float32, quant_algo=None):
        self.world, self.cache, self.lengths = World(tp * pp), {}, {}
        weights = load_file(folder / "model.safetensors")

        def build(rank):
            config = AutoConfig.from_pretrained(folder)
            config.torch_dtype = dtype
            mapping = Mapping(tp * pp, rank, tp, pp)
            model = cls(trtllm_torch.ModelConfig(config, mapping, quant_algo))
            model.load_weights(weights)
            return model.requires_grad_(False)

        with trtllm_torch.installed():
            with pytest.MonkeyPatch.context() as patch:  # as tensorrt_llm/tools/importlib_utils.py does
                patch.syspath_prepend(ROOT / "export" / "trtllm" / "custom")
                importlib.import_module("ngpt_trtllm")
            cls = trtllm_torch.MODEL_CLASS_MAPPING[json.loads((folder / "config.json").read_text())["architectures"][0]]
            self.models = [build(rank) for rank in range(tp * pp)]

    def step(self, requests):
        """requests: (name, token ids) -> logits of each."""
        names, counts = [name for name, _ in requests], [len(ids) for _, ids in requests]
        past = [self.lengths.get(name, 0) for name in names]
        ids = torch.from_numpy(np.concatenate([ids for _, ids in requests]).astype(np.int32))
        places = torch.cat([torch.arange(p, p + n) for p, n in zip(past, counts, strict=True)]).int()[None]
        meta = trtllm_torch.AttentionMetadata(names, counts, past, self.cache)

        def run(rank):
            return self.models[rank](meta, input_ids=ids, position_ids=places, return_context_logits=True)

        self.lengths |= {name: p + n for name, p, n in zip(names, past, counts, strict=True)}
        return [part.numpy() for part in self.world.run(run)[-1].split(counts)]


@pytest.fixture
def folder(golden, tmp_path):
    if not golden.name.startswith("research"):
        return golden.folder
    with open_checkpoint(golden.folder / "ckpt.pt") as checkpoint:
        return save_hf(checkpoint, tmp_path / "hf")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_chunks_and_single_tokens_compute_golden_logits(golden, folder, tp, pp):
    engine = Engine(folder, tp, pp)
    for row, real in enumerate(golden.real):
        ids, parts = golden.ids[row][real][:24], []
        for start, end in ((0, 7), (7, 20), (20, 21), (21, 24)):
            other = [("other", golden.ids[0][golden.real[0]][start:end])] if row else []
            parts.append(engine.step([(row, ids[start:end]), *other])[0])
        assert np.abs(np.concatenate(parts) - golden.logits[row][real][:24]).max() <= LOGIT_ERROR


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant(name, tmp_path):
    case = Case(VARIANTS[name], tmp_path)
    got = Engine(tmp_path, tp=2).step([(0, case.ids[0][:20])])[0]
    assert np.abs(got - case.logits[0][:20]).max() <= 2e-5 * max(1.0, np.abs(case.logits).max() / 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_pytorch(hf_case, dtype):
    from ngpt import NGPTForCausalLM

    model = NGPTForCausalLM.from_pretrained(hf_case.folder, dtype=dtype, attn_implementation="eager")
    ids, want = hf_case.ids[-1], hf_case.logits[-1]
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)[None]).logits[0].double().numpy() - want
    ours = Engine(hf_case.folder, dtype=dtype).step([(0, ids)])[0] - want
    assert 0 < np.sqrt(np.mean(ours**2)) <= 2 * np.sqrt(np.mean(theirs**2))


def test_the_head_is_never_shared_with_the_table(tmp_path):
    """TensorRT-LLM ties the two when the config says so; here the head's rows carry sz."""
    Case(VARIANTS["tied"], tmp_path)
    model = Engine(tmp_path).models[0]
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert float((model.model.embed_tokens.weight.norm(dim=1) - 1).abs().max()) < 1e-5


class Base:
    """Stands for PretrainedConfig of transformers 4, whose default for tied embeddings is true and which adds keys of its own."""

    def __init__(self, tie_word_embeddings=True, **keys):
        vars(self).update(keys, tie_word_embeddings=tie_word_embeddings, transformers_version="4.57.1", return_dict=True)


@pytest.mark.parametrize("name", ["gqa", "llama3-rope-bias"])
def test_the_configuration_class_for_transformers_4_means_the_same(name):
    text = json.loads((GOLDEN / name / "config.json").read_text())
    with trtllm_torch.installed():
        module = importlib.import_module("export.trtllm.modeling_ngpt")
        config = module.runtime_config(Base)(**{k: v for k, v in text.items() if k != "model_type"})
        assert NGPTSpec.from_config(module.config_dict(config)) == NGPTSpec.from_config(text)


def test_lazy_slices_are_read_and_wrong_tensors_or_those_without_a_place_refused():
    with trtllm_torch.installed(), safe_open(GOLDEN / "gqa" / "model.safetensors", "pt") as file:
        module = importlib.import_module("export.trtllm.modeling_ngpt")
        config = trtllm_torch.ModelConfig(AutoConfig.from_pretrained(GOLDEN / "gqa"), Mapping())
        config.pretrained_config.torch_dtype = torch.float32
        model = module.NGPTForCausalLM(config)
        weights = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        model.load_weights(weights)
        assert not any(bool(torch.isnan(p).any()) for p in model.parameters())
        with pytest.raises(ShapeError, match="sz.weight"):
            model.load_weights(weights | {"sz.weight": torch.zeros(3, 1)})
        del module.PLACES["mlp.lr"]
        model.model.layers[0].mlp.kind = "mish"
        with pytest.raises(UnsupportedError, match="activation in .*PyTorch flow.*found mish"):
            model.model.layers[0].mlp(torch.zeros(1, 64))
        with pytest.raises(UnsupportedError, match=r"the tensor mlp\.lr in TensorRT-LLM's PyTorch flow"):
            model.load_weights(weights)


def test_what_is_not_offered_is_refused_by_name():
    with pytest.raises(UnsupportedError, match="FP8"):
        Engine(GOLDEN / "gqa", quant_algo="FP8")
    with pytest.raises(MissingPackageError, match="TensorRT-LLM"):
        importlib.import_module("export.trtllm.modeling_ngpt")
    with pytest.raises(MissingPackageError, match="trtllm-build"):
        importlib.import_module("export.trtllm.model")


def test_requests_do_not_see_each_other():
    case = Golden("gqa")
    engine = Engine(GOLDEN / "gqa", tp=2)
    a, b = case.ids[0], case.ids[1]
    first = engine.step([("a", a[:9]), ("b", b[:4])])
    second = engine.step([("b", b[4:11]), ("a", a[9:10])])
    for got, row, piece in (
        (first[0], 0, slice(9)),
        (first[1], 1, slice(4)),
        (second[0], 1, slice(4, 11)),
        (second[1], 0, slice(9, 10)),
    ):
        assert np.abs(got - case.logits[row][piece]).max() <= LOGIT_ERROR


def test_what_would_be_wrong_without_a_word_is_refused():
    """Attention data parallelism takes another rank's slice of q_scale; adapters were swallowed by **kwargs."""
    with trtllm_torch.installed():
        module = importlib.import_module("export.trtllm.modeling_ngpt")
        config = trtllm_torch.ModelConfig(AutoConfig.from_pretrained(GOLDEN / "gqa"), Mapping())
        config.pretrained_config.torch_dtype = torch.float32
        model = module.NGPTForCausalLM(config)
        with pytest.raises(UnsupportedError, match="LoRA adapters"):
            model.model(None, input_ids=torch.zeros(1, dtype=torch.int64), lora_params={"num_seqs": 1})
        config.mapping.enable_attention_dp = True
        with pytest.raises(UnsupportedError, match="attention data parallelism"):
            module.NGPTForCausalLM(config)
