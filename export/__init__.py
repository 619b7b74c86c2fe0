"""From a checkpoint to a runtime's graph: one statement of the network (`network`), one lowering per runtime (`lowerings`,
`trtllm`)."""
