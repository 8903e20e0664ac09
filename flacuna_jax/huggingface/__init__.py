"""The boundary to Hugging Face: checkpoints, adapters and tokenizers, in and out, each crossing verified."""
