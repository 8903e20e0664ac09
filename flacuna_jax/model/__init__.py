"""The LLaMA network, its adapters, and their sharding on a mesh."""
