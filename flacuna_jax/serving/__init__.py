"""A server with OpenAI's API, and a page, for one base model and several adapters."""
