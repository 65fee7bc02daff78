"""Checkpoints in and out: files and folders (`folder`), PyTorch names <-> our trees (`names`)."""
