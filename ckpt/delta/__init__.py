"""A fine-tune as a small difference to its base: made, stored as a checkpoint, and applied again.

In: checkpoints or folders. Out: checkpoints. docs/how-to/delta.md shows the calls.
"""

from ckpt.delta.api import Applied, Made, apply, look, make

__all__ = ["Applied", "Made", "apply", "look", "make"]
