"""LoRA adapters: read from PEFT's folders and from checkpoints, merged, folded into their base.

In: adapters. Out: an adapter, or a model, as a checkpoint. docs/how-to/lora.md shows the call.
"""

from ckpt.lora.api import Merged, merge

__all__ = ["Merged", "merge"]
