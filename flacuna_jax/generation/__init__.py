"""Decoding: one engine for `generate`, `chat`, `evaluate` and evaluations inside a training run."""
