"""Distance of the network on the double from PyTorch in float32, by precision: python -m tests.trtllm.measure [CHECKPOINT]

What rounding costs as this project reads it; no statement about TensorRT-LLM's kernels.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from engines.parity.prompts import TEXTS
from export.trtllm.parallel import Parallel
from tests.conftest import TINY
from tests.doubles.torch_reference import TorchReference
from tests.trtllm.serving import Engine, converted


def main(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [np.array(tokenizer.encode(text).ids[:60]) for text in TEXTS]
    model = TorchReference(folder, "float32")
    want = np.concatenate([model.run(tuple(map(int, ids)))[0] for ids in texts])
    print(f"{sum(map(len, texts))} tokens of {folder.name}, tp 2")
    print(f"{'precision':15} {'relative rms error':>18} {'smallest cosine':>16} {'first choice':>12}")
    own = [(precision, "auto") for precision in ("fp32", "fp16", "bf16", "int8", "fp8", "int4")]
    for precision, kv_cache in [*own, ("fp16", "fp8"), ("bf16", "fp8"), ("fp8", "fp8")]:
        with tempfile.TemporaryDirectory() as scratch:
            engine = Engine(converted(folder, Path(scratch), Parallel(2), precision, kv_cache=kv_cache), 2)
            # An fp8 cache is read by decoded tokens alone: all but the first are.
            got = np.concatenate([engine.read(i, ids, (1 if kv_cache == "fp8" else len(ids),)) for i, ids in enumerate(texts)])
        relative = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
        cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
        same = (got.argmax(-1) == want.argmax(-1)).mean()
        print(f"{precision + (', cache fp8' if kv_cache == 'fp8' else ''):15} {relative:18.2g} {cosine.min():16.6f} {same:12.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY)
