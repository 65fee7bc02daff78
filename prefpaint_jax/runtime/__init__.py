"""Code that all commands share: flags, workdirs, devices, checkpoints and metrics."""
