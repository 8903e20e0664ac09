"""A whole Flacuna in minutes on two CPU cores: generated data, a stand-in for Vicuna, LoRA, and a table of results."""
