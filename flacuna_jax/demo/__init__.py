"""Trains a small Flacuna in minutes on two CPU cores: generated data, a stand-in for Vicuna, LoRA, and results."""
