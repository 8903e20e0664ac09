"""Decoding: one engine for `generate`, `chat`, `evaluate` and evaluations during training."""
