"""Reading nGPT checkpoints: a Hugging Face folder (single or sharded safetensors) or the research code's ckpt.pt.

Every file is read as if it were hostile; every problem is a typed error naming the tensor, key or file.
"""

from ngpt.checkpoint.base import Checkpoint
from ngpt.checkpoint.folded_head import fold_scales
from ngpt.checkpoint.formats import open_checkpoint
from ngpt.checkpoint.normalized import Change, normalize
from ngpt.checkpoint.safetensors_file import TensorInfo
from ngpt.checkpoint.save import save_hf
from ngpt.tensor_names import Expected, expected_tensors

__all__ = [
    "Change",
    "Checkpoint",
    "Expected",
    "TensorInfo",
    "expected_tensors",
    "fold_scales",
    "normalize",
    "open_checkpoint",
    "save_hf",
]
