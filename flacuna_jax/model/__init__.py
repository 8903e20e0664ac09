"""The LLaMA network, its adapters and how both lie on a mesh."""
