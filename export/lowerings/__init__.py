"""One module per runtime, each implementing the vocabulary of `base.Lowering`."""
