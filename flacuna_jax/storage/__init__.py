"""Run directories, buckets and checkpoints."""
