"""A server with OpenAI's API, and a page, for one base model and several adapters."""

LONGEST = 4096
"""Tokens of prompt and answer together, if `flacuna serve --context` does not say."""
