"""Reads and writes checkpoints, adapters and tokenizers of Hugging Face, and verifies what it writes."""
