"""ckpt: distributed checkpoints for torch.distributed training."""
