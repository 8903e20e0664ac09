"""A training run: set-up, data, start and resume, the hooks around its steps, evaluation, and delivery."""
