"""Builds FLAN-mini from its sources: readers, templates, few-shot groups, mixture, and an account of every record."""
