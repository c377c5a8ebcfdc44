"""LoRA adapters: read from PEFT's folders and from checkpoints, merged, folded into their base.

In: adapters. Out: an adapter, or a model, as a checkpoint. `merge` of ckpt.lora.api is the call; docs/how-to/lora.md shows it.
"""
