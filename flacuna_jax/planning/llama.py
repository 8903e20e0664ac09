"""The sizes of LLaMA. Numbers only, so that a command line can list them without importing JAX."""

LLAMA = {
    "7b": (32000, 4096, 11008, 32, 32, 32, 128),
    "13b": (32000, 5120, 13824, 40, 40, 40, 128),
    "30b": (32000, 6656, 17920, 60, 52, 52, 128),
    "65b": (32000, 8192, 22016, 80, 64, 64, 128),
}
"""The first fields of `LlamaConfig`. Touvron et al., 2023 (arXiv:2302.13971), table 2, and the released config.json
files."""
