"""Bytes by key: local folders, S3, other fsspec file systems."""
