"""A run: from a config to stages, models, tests and rows."""
