"""Checkpoint files: formats, readers and writers."""
