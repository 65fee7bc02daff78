"""What every command shares: flags, workdirs, devices, checkpoints, metrics."""
