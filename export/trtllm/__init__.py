"""nGPT for TensorRT-LLM: its checkpoint format, its model class, and the command that builds.

`convert`, `layout`, `parallel`, `fp8`, `config` and `build` need no TensorRT-LLM. `model` and `export.lowerings.tensorrt_llm` (1.2, the
engine flow) run under `trtllm-build`; `modeling_ngpt` (1.3 and later, the PyTorch flow) under `trtllm-serve`. Both are checked against
doubles of the API; neither has been executed on TensorRT-LLM, whose wheel its vendor's index alone holds.
"""
