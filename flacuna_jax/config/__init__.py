"""Settings of a run: the schema, the files they come from, and their descriptions."""
