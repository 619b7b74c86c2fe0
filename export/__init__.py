"""From a checkpoint to a runtime's graph: one trace (`network`), one lowering per runtime (`lowerings`)."""
