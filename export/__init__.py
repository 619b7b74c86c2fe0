"""From a checkpoint to a runtime's graph: one `network`, one lowering for each runtime (`lowerings`, `trtllm`)."""
