"""Merging: methods, recipes, streaming run."""
