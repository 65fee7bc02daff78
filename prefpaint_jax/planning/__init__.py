"""What an iteration costs on chips that need not be present."""
