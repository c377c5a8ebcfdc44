"""Merge methods. Every module of this folder is imported, and registers what is in it."""
