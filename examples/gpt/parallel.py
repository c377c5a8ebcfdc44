"""Lay one model over ranks in four ways, behind one call that trains it.

In: a layout's name, a `ModelConfig`, a seed; the default process group, where there is more than one rank. Out: a
`Replica`: the part of the model on this rank, its place, and forward, backward and clipping as that layout does them.
Never touches the optimizer, the loader or a checkpoint. Loss and gradient are those of the mean over the GLOBAL batch,
on every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from examples.gpt.model import GPT, ModelConfig, ModelPart, initialise, loss_sum

LAYOUTS = ("single", "fsdp", "tp_fsdp", "pp")
TENSOR_PARALLEL_SIZE = 2  # of `tp_fsdp`; the other ranks of it are data-parallel
MICRO_BATCHES = 4  # of `pp`

# (inputs, targets) of this rank -> the mean loss over the tokens of its data-parallel group's batch, on every rank
ForwardBackward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """This rank's part of the model and how to train it."""

    model: GPT
    dp_rank: int
    dp_size: int
    forward_backward: ForwardBackward
    stages: dist.ProcessGroup | None = None  # ranks that hold other parameters; None: each rank has a part of all

    def clip_gradients(self, max_norm: float) -> float:
        """Scale all gradients so that their norm over the WHOLE model is at most `max_norm`; returns what it was."""
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.stages is not None:
            square = norm.square()
            dist.all_reduce(square, group=self.stages)
            norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm)
        return norm.item()


def build(layout: str, config: ModelConfig, *, seed: int, batch_shape: tuple[int, int]) -> Replica:
    """The replica of this rank; every rank calls it. `batch_shape` is that of the global batch, [sequences, tokens]."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "single":
        if world != 1:
            raise ValueError(f"layout `single` runs on 1 rank, found {world}")
        return _single(config, seed)
    if layout == "fsdp":
        return _fsdp(config, seed, world)
    if layout == "tp_fsdp":
        return _tensor_parallel_fsdp(config, seed, world)
    if layout == "pp":
        return _pipeline(config, seed, world, batch_shape)
    raise ValueError(f"layout `{layout}` is none of {', '.join(LAYOUTS)}")


def _single(config: ModelConfig, seed: int) -> Replica:
    model = _whole(config, seed)
    return Replica(model=model, dp_rank=0, dp_size=1, forward_backward=_mean_over(model, None))


def _fsdp(config: ModelConfig, seed: int, world: int) -> Replica:
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = _shard(_whole(config, seed), mesh)
    return Replica(
        model=model, dp_rank=dist.get_rank(), dp_size=world, forward_backward=_mean_over(model, mesh.get_group())
    )


def _tensor_parallel_fsdp(config: ModelConfig, seed: int, world: int) -> Replica:
    dp_size, rest = divmod(world, TENSOR_PARALLEL_SIZE)
    if rest:
        raise ValueError(f"layout `tp_fsdp` needs a multiple of {TENSOR_PARALLEL_SIZE} ranks, found {world}")
    mesh = init_device_mesh("cpu", (dp_size, TENSOR_PARALLEL_SIZE), mesh_dim_names=("dp", "tp"))
    model = _whole(config, seed)
    # Between the matrices, activations are cut over the sequence; norms work on that cut and are replicated.
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),  # cut over the vocabulary
        "layers.*.attention_norm": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(
            input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
        ),
        "layers.*.attention.w[qkv]": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "layers.*.feed_forward_norm": SequenceParallel(),
        "layers.*.feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "layers.*.feed_forward.w[13]": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tp"], plan)
    model.tie()  # the two ends were cut one by one
    _shard(model, mesh["dp"])
    return Replica(
        model=model,
        dp_rank=mesh.get_local_rank("dp"),
        dp_size=dp_size,
        forward_backward=_mean_over(model, mesh.get_group("dp")),
    )


def _pipeline(config: ModelConfig, seed: int, world: int, batch_shape: tuple[int, int]) -> Replica:
    """Each rank is a stage: it makes only its own layers, under their names in the whole model."""
    rank = dist.get_rank()
    bounds = [config.num_layers * stage // world for stage in range(world + 1)]
    part = ModelPart(layer_start=bounds[rank], layer_stop=bounds[rank + 1], first=rank == 0, last=rank == world - 1)
    model = GPT(config, part)
    initialise(model, seed=seed)
    sequences, tokens = batch_shape
    micro = sequences // MICRO_BATCHES
    # Shapes, and what needs a gradient, are given, so that the stages need not ask each other for them.
    activations = torch.empty(micro, tokens, config.width, device="meta", requires_grad=True)
    logits = torch.empty(micro, tokens, config.vocabulary_size, device="meta", requires_grad=True)
    stage = PipelineStage(
        model,
        rank,
        world,
        torch.device("cpu"),
        input_args=torch.empty(micro, tokens, dtype=torch.int64, device="meta") if part.first else activations,
        output_args=logits if part.last else activations,
    )
    schedule = ScheduleGPipe(stage, MICRO_BATCHES, loss_fn=lambda out, to: loss_sum(out, to) / to.numel())

    def forward_backward(inputs: Tensor, targets: Tensor) -> Tensor:
        losses: list[Tensor] = []
        schedule.step(
            *((inputs,) if part.first else ()),
            target=targets if part.last else None,
            losses=losses if part.last else None,
            return_outputs=False,
        )
        loss = torch.stack(losses).mean() if part.last else torch.zeros(())
        dist.all_reduce(loss)  # only the last stage has it
        return loss.detach()

    return Replica(model=model, dp_rank=0, dp_size=1, forward_backward=forward_backward, stages=dist.group.WORLD)


def _whole(config: ModelConfig, seed: int) -> GPT:
    model = GPT(config)
    initialise(model, seed=seed)
    return model


def _shard(model: GPT, mesh: DeviceMesh) -> GPT:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _mean_over(model: nn.Module, group: dist.ProcessGroup | None) -> ForwardBackward:
    """Each rank takes the mean over its own share, FSDP averages the gradients: the mean over the global batch."""

    def forward_backward(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = loss_sum(model(inputs), targets) / targets.numel()
        torch.autograd.backward(loss)
        mean = loss.detach().clone()
        if group is not None:
            dist.all_reduce(mean, group=group)
            mean /= group.size()
        return mean

    return forward_backward
