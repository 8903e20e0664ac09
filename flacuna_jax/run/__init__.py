"""A training run: how its parts are put together, where it starts, what happens around its steps, what it delivers."""
