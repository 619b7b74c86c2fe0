"""What runs inside Triton's Python backend, by owner; `triton_repo.package` copies it into a model repository under these
very names.

`engine`: this project's own models. `trtllm_backend`: how a text model reaches TensorRT-LLM's engine backend.
`trtllm_pytorch`: the model of TensorRT-LLM's PyTorch runtime. `shared`: what they have in common.
"""
