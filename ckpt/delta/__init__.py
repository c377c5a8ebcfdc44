"""A fine-tune as a small difference to its base: made, stored as a checkpoint, and applied again.

In: checkpoints or folders. Out: checkpoints. `make` and `apply` of ckpt.delta.api are the calls; docs/how-to/delta.md shows them.
"""
