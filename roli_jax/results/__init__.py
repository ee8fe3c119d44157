"""Rows of results: grouped, compared, drawn and written as tables."""
