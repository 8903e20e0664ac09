"""Attention over packed rows and chunked cross-entropy. Imports nothing of the package but `errors`."""
