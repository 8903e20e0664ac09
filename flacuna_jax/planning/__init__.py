"""Predicts the requirements of a run with the real compiler, for present and absent hardware."""
