"""Import and export of weights: files (`folder`) and PyTorch names <-> Flax trees (`names`)."""
