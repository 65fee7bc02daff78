"""Images, masks and prompts, on the host: NumPy and PIL only, nothing here touches a device."""
