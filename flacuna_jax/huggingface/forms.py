"""The forms that weights can be written in. Names only, so that command lines can list them without importing JAX."""

from typing import Literal

Format = Literal["adapter", "merged", "gguf"]
StoredDtype = Literal["bfloat16", "float16", "float32"]
"""Of the weights in Hugging Face's and the native form."""
GgufType = Literal["f16", "bf16", "q8_0"]
"""Of the matrices in a GGUF file."""
SHARD_BYTES = 5_000_000_000
"""Maximum size of a weight file of a merged model."""
