"""TEST DOUBLE of `trtllm-build` 1.2: its options (tensorrt_llm/commands/build.py, commit 65f1d153) and order of work.

It loads the class as the program does (module `models`, configuration looked up in MODEL_MAP) and every rank's
weights through the double of the API; the "engines" it writes say which rank they are. Environment: TRTLLM_FAIL makes
it fail after the first rank.
"""

import argparse
import copy
import json
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

from tests.doubles.tensorrt_llm_double import installed

PLUGIN = ["auto", "float16", "float32", "bfloat16", "int32", "disable"]
SWITCH = ["enable", "disable"]


def parser():
    top = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("checkpoint_dir", "output_dir", "model_cls_file", "model_cls_name"):
        top.add_argument(f"--{name}", type=Path if name != "model_cls_name" else str, required=True)
    for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "workers"):
        top.add_argument(f"--{name}", type=int)
    top.add_argument("--kv_cache_type", choices=["continuous", "paged", "disabled"])
    for name in ("gpt_attention_plugin", "gemm_plugin"):
        top.add_argument(f"--{name}", choices=PLUGIN, default="auto")
    for name in ("context_fmha", "remove_input_padding", "use_paged_context_fmha", "use_fp8_context_fmha"):
        top.add_argument(f"--{name}", choices=SWITCH, default="enable")
    return top


def main():
    sys.modules["transformers"] = None  # TensorRT-LLM 1.2 pins version 4, which this project does not use
    args = parser().parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with installed():
        from tests.doubles.tensorrt_llm_double.models import PretrainedConfig

        module = SourceFileLoader("models", str(args.model_cls_file)).load_module()
        model_cls = getattr(module, args.model_cls_name)
        config = PretrainedConfig.from_json_file(args.checkpoint_dir / "config.json")
        assert args.gpt_attention_plugin == config.dtype
        assert (
            config.kv_dtype != "fp8" or args.use_paged_context_fmha == "disable"
        )  # builder.py would change it, or turn FP8 FMHA on
        for rank in range(config.mapping.world_size):
            model = model_cls.from_checkpoint(args.checkpoint_dir, rank, copy.deepcopy(config))
            print(f"rank {rank}: {sum(1 for _ in model.named_parameters())} parameters", flush=True)
            if "TRTLLM_FAIL" in os.environ:
                sys.exit("out of memory, says the stand-in")
            (args.output_dir / f"rank{rank}.engine").write_text(f"rank {rank}")
    (args.output_dir / "config.json").write_text(
        json.dumps({"version": "1.2.1", "pretrained_config": {}, "build_config": {"max_batch_size": args.max_batch_size}})
    )


if __name__ == "__main__":
    main()
