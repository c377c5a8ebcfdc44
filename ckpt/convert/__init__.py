"""Checkpoints in the forms of other programs: import and export."""
