"""One file a network: its module as it is traced, its tensors, its weights."""
