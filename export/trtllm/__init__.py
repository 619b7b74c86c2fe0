"""Everything of TensorRT-LLM: its checkpoint format and both of its ways to define a model.

    checkpoint format     config, convert, layout, fp8, rank_file; `parallel` divides a network among GPUs
    engine flow (1.2)     lowering, model; model_file is what `trtllm-build --model_cls_file` loads
    PyTorch flow (1.3)    modeling_ngpt; custom/ngpt_trtllm is what `trtllm-serve --custom_module_dirs` loads

What writes the checkpoint needs no TensorRT-LLM. Both flows are checked against doubles of its API; neither has been executed on
TensorRT-LLM, whose wheel its vendor's index alone holds.
"""
