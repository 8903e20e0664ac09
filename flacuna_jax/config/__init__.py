"""Settings of a run: a module for each large section, the files they come from, and their descriptions."""
