"""Files that mean no good, for every reader of this project: how they are made, and processes that read them."""
