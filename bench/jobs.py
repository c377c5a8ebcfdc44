"""Training jobs whose state is saved: a loop with a real forward, backward and optimizer step, on a sharded state.

In: shapes and a mesh. Out: `Job`, whose `step()` takes about as long as it was asked to and changes the very tensors that are
saved, in place. Made for measuring what saves take from training, not for learning anything.

A step is: forward and backward of a small network (as many times as fill the time), one small all-reduce over the ranks, and
`optimizer.step()`. An update of the whole state would take longer than a short step, so each one updates a share of the
parameters, all of them in turn; on each, it does all of Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bench.ranks import Rank
from bench.workloads import SLOTS, State, local_of

_WIDTH, _ROWS = 512, 64
_UPDATE_PART = 0.4  # of a step's time that may go into updates


class ShardedAdam(Optimizer):
    """Adam on bf16 shards with fp32 master copies, on a share of the parameters per step, all of them in turn.

    Has no gradients of its own: what it takes for one is the master copy.
    """

    def __init__(self, params: Iterable[torch.Tensor], slots: Callable[[torch.Tensor], State]) -> None:
        super().__init__(params, {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8})
        self._all = [param for group in self.param_groups for param in group["params"]]
        self._turn, self.num_turns = 0, 1
        for param in self._all:
            self.state[param] = slots(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        (beta1, beta2), rate, eps = group["betas"], group["lr"], group["eps"]
        for param in self._all[self._turn :: self.num_turns]:
            slots = {name: local_of(slot) for name, slot in self.state[param].items()}
            master, first, second = slots["master"], slots["exp_avg"], slots["exp_avg_sq"]
            first.lerp_(master, 1 - beta1)
            second.mul_(beta2).addcmul_(master, master, value=1 - beta2)
            master.addcdiv_(first, second.sqrt().add_(eps), value=-rate)
            local_of(param).copy_(master)
        self._turn = (self._turn + 1) % self.num_turns


class PlainDecay(Optimizer):
    """The plainest optimizer: every tensor is a parameter, decayed in place, a share of them per step."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        super().__init__(params, {"lr": 1e-5})
        self._all = [param for group in self.param_groups for param in group["params"]]
        self._turn, self.num_turns = 0, 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self._all[self._turn :: self.num_turns]:
            local_of(param).mul_(1 - self.param_groups[0]["lr"])
        self._turn = (self._turn + 1) % self.num_turns


class Job:
    """A training loop on one rank. All ranks make it and step it alike."""

    def __init__(self, rank: Rank, tensors: State, *, workload: str) -> None:
        self.tensors = tensors  # all that is saved, by name: what DCP gets
        for tensor in tensors.values():
            tensor.requires_grad_()
        self._rank = rank
        if workload == "gpt":
            params = {name.removeprefix("param/"): t for name, t in tensors.items() if name.startswith("param/")}
            names = {id(tensor): name for name, tensor in params.items()}
            self.optimizer: ShardedAdam | PlainDecay = ShardedAdam(
                params.values(), lambda p: {s: tensors[f"{s}/{names[id(p)]}"] for s in SLOTS if s != "param"}
            )
            self.state: dict[str, Any] = {"model": params, "optimizer": self.optimizer}  # what ckpt gets
        else:
            self.optimizer = PlainDecay(tensors.values())
            self.state = {"model": tensors}
        self._net = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))
        self._input = torch.ones(_ROWS, _WIDTH)
        self._num_passes = 1

    def calibrate(self, step_s: float) -> None:
        """Make a step take about `step_s` where nothing is saved. All ranks call."""
        self.optimizer.num_turns, self._num_passes = 1, 1
        for _ in range(2):  # the first touch of memory counts for nothing
            update_s = self._rank.slowest(_seconds(self.optimizer.step))
            pass_s = self._rank.slowest(_seconds(self._pass))
        self.optimizer.num_turns = max(1, round(update_s / (_UPDATE_PART * step_s)))
        left = step_s - update_s / self.optimizer.num_turns
        self._num_passes = max(1, round(left / pass_s))

    def step(self) -> None:
        """One step of training."""
        for _ in range(self._num_passes):
            self._pass()
        dist.all_reduce(self._net[0].bias.grad)
        self.optimizer.step()

    def _pass(self) -> None:
        self._net.zero_grad(set_to_none=True)
        loss: Any = self._net(self._input).square().mean()
        loss.backward()

    def facts(self) -> dict[str, float]:
        """How a step is made up."""
        return {"passes": self._num_passes, "updated_share": round(1 / self.optimizer.num_turns, 3)}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def local_bytes(tensors: State) -> int:
    """Bytes of this rank's part."""
    locals_ = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    return sum(t.numel() * t.element_size() for t in locals_)
