"""One file a network: its tensors, what feeds it and what comes out."""
