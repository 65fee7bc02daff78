"""Images, masks, prompts and preferences. All code here runs on the host, with NumPy and PIL."""
