"""The states that are saved and loaded: tensors with the shapes of the research page, filled with known values.

In: sizes and a mesh. Out: name -> DTensor (or tensor). The same seed gives the same values on any layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
SLOTS = {"param": torch.bfloat16, "master": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32}


def small_shapes(num: int) -> Shapes:
    """`num` fp32 vectors of 64 to 4,096 elements."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(64, 4097, (num,), generator=generator).tolist()
    return {f"layers.{i:05d}.scale": ((n,), torch.float32) for i, n in enumerate(sizes)}


def gpt_params(*, layers: int, width: int, vocabulary: int = 50257, context: int = 1024) -> dict[str, tuple[int, ...]]:
    """Parameters of a GPT-2: 124M of them with 12 layers of width 768."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    for i in range(layers):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc", 4 * width, width),
            ("mlp.proj", width, 4 * width),
        ):
            shapes[f"h.{i}.{name}.weight"], shapes[f"h.{i}.{name}.bias"] = (rows, columns), (rows,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (width,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    return shapes


def gpt_shapes(*, layers: int, width: int, vocabulary: int = 50257) -> Shapes:
    """Every parameter four times: bf16, fp32 master and both moments of Adam."""
    params = gpt_params(layers=layers, width=width, vocabulary=vocabulary)
    return {f"{slot}/{name}": (shape, dtype) for slot, dtype in SLOTS.items() for name, shape in params.items()}


def tp_placement(name: str) -> Placement:
    """Where a tensor-parallel rank holds a parameter of the GPT: columns, rows, vocabulary, or all of it."""
    if ".attn.qkv." in name or ".mlp.fc." in name or name.endswith("wte.weight"):
        return Shard(0)
    if name.endswith("proj.weight"):
        return Shard(1)
    return Replicate()


def nbytes(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes.values())


def whole(name_number: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The global tensor: values that differ between tensors and between elements, and hold no NaN."""
    count = torch.Size(shape).numel()
    values = torch.arange(count, dtype=torch.int32).mul_(7919).add_(name_number * 104729)
    return values.bitwise_and_(0xFFFF).to(torch.float32).to(dtype).reshape(shape)


def sharded(shapes: Shapes, mesh: DeviceMesh, placements: Mapping[str, tuple[Placement, ...]], *, fill: bool) -> State:
    """The state as DTensors on `mesh`; zeros unless filled. No communication."""
    state: State = {}
    for number, (name, (shape, dtype)) in enumerate(shapes.items()):
        local = whole(number, shape, dtype) if fill else torch.zeros(shape, dtype=dtype)
        # From the last mesh axis to the first: where both cut one dim, tensor parallelism has cut before FSDP does.
        for axis, placement in reversed(list(enumerate(placements[name]))):
            if isinstance(placement, Shard | _StridedShard):
                parts = local.chunk(mesh.size(axis), placement.dim)
                at = mesh.get_local_rank(axis)
                local = parts[at] if at < len(parts) else local.narrow(placement.dim, 0, 0)
        local = local.clone(memory_format=torch.contiguous_format)
        stride = torch.empty(shape, device="meta").stride()
        state[name] = DTensor.from_local(
            local, mesh, placements[name], run_check=False, shape=torch.Size(shape), stride=stride
        )
    return state


def plain(shapes: Shapes, *, fill: bool) -> State:
    """The state of a single rank."""
    return {
        name: whole(number, shape, dtype) if fill else torch.zeros(shape, dtype=dtype)
        for number, (name, (shape, dtype)) in enumerate(shapes.items())
    }


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this rank holds."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def check_equal(found: State, expected: State, *, what: str) -> None:
    """AssertionError that names the first tensor with a wrong bit."""
    for name, tensor in expected.items():
        if not torch.equal(local_of(found[name]), local_of(tensor)):
            raise AssertionError(f"{what}: tensor {name} came back with other values")


def scramble(state: State) -> None:
    """Overwrite a load target, so that a load that does nothing is found out."""
    for tensor in state.values():
        local_of(tensor).fill_(-1)
