"""Several processes that train one thing: who they are, how they split networks among them, and what they tell each other.

They are started by `torchrun` or `accelerate launch`, which say in the environment who is who; a process that nobody launched is alone, and
then everything here does nothing. What is trained does not depend on how many there are: a batch is dealt out in parts, its gradient is the
mean over all of them, and whatever is random belongs to a clip.

Networks are split with FSDP2 over the ranks that share one copy; copies are kept equal by their gradients (hybrid sharding). What is trained is
brought together at the beginning of a step and given back after it, so that a stream may read its weights; float32 weights, gradients
and the optimiser's state stay split. What is frozen comes block by block, from the other ranks or from the CPU's memory.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from rfbench.backbones.wan.dit import WanDiT
from rfbench.baselines import device
from rfbench.errors import UserError
from rfbench.launched import place

PATIENCE = timedelta(hours=2)  # with which ranks wait for each other: one of them may be hashing files or rendering samples
UNREAD = {  # what `accelerate launch` or its configuration file may ask for and nobody here would do -> what stands for not asking
    **dict.fromkeys(("USE_FSDP", "USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG"), "false"),
    **dict.fromkeys(("MIXED_PRECISION", "DYNAMO_BACKEND"), "no"),
}
REASON = "reason"  # key under which the first process that fails leaves its sentence

Part = TypeVar("Part")


class EndedElsewhereError(UserError):
    """A run that another of its processes has ended, and has said why."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # (copies, ranks that share a copy); None: networks are whole
    offload: bool = False  # frozen networks wait in the CPU's memory
    store: Any = None  # where the first process that fails leaves its reason

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def deal(self, clips: int, parts: int) -> int:
        """Micro-batches that a batch is split into: `parts`, or more of them if they would not go round.

        Raises:
            UserError: the clips do not split into so many.
        """
        dealt = math.lcm(parts, self.size)
        if clips % dealt:
            raise UserError(f"a batch of {clips} clips in {parts} micro-batches do not go round {self.size} processes; launch as many as divide them")
        return dealt

    def own(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Of as many parts as go round, in order, those of this process."""
        each = len(parts) // self.size
        return parts[self.rank * each : (self.rank + 1) * each]

    def together(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Figures [n] of this process's clips (the same ones, and as many, everywhere) -> those of all clips, in their order, on the CPU."""
        if self.size == 1 or not own:
            return dict(own)
        rows = torch.stack([value.cpu() for value in own.values()])
        everyone = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(everyone, rows)
        return dict(zip(own, torch.cat(everyone, 1), strict=True))

    def told(self, value: Any) -> Any:
        """What the first process knows."""
        if self.size == 1:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def wait(self) -> None:
        """Until everybody is here."""
        self.told(None)
        self.together({"here": torch.zeros(1)})

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Work that others take part in.

        Raises:
            EndedElsewhereError: another process has failed and said why.
            UserError: another process was killed (code 1).
        """
        try:
            yield
        except EndedElsewhereError:
            raise
        except Exception as error:
            if self.store is None:
                raise
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            sentence = (
                f"a process of this run was killed, as rank {self.rank} of {self.size} heard; the same command goes on from the last checkpoint"
            )
            mine = f"rank {self.rank}: {sentence if lost else error}"
            try:
                reason = self.store.compare_set(REASON, "", mine).decode()
            except dist.DistError:  # whoever kept it is gone
                reason = mine
            if reason != mine:
                raise EndedElsewhereError(reason, code=1) from None
            if lost:
                raise UserError(sentence, code=1) from None
            raise

    def split_trained(self, module: nn.Module) -> None:
        """Move a network that is trained to the device, split: stored in float32, each part computed with in the dtype that it has now."""
        if self.mesh is None or self.size == 1:
            module.to(device())
            return
        for unit in _called(module):
            low = {part: next(part.parameters()).dtype for part in _low(unit)}
            unit.float()
            for part, dtype in (low | {unit: low.get(unit, torch.float32)}).items():
                policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)  # t is float64
                fully_shard(part, mesh=self.mesh, reshard_after_forward=False, mp_policy=policy)
                cast(FSDPModule, part).set_reshard_after_backward(False)
            if isinstance(unit, WanDiT):
                register_fsdp_forward_method(unit, "text_kv")  # a stream begins with it, and the first to be called has to be the whole
        module.to(device())

    def split_frozen(self, module: WanDiT) -> None:
        """Move a network that is only asked to the device, split; its blocks are there while they are at work."""
        if self.mesh is None:
            module.to(device())
            return
        policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=device().type == "cuda") if self.offload else OffloadPolicy()
        for unit in (*module.blocks, module):
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, offload_policy=policy)


ALONE = Ranks()


def _called(module: nn.Module) -> list[nn.Module]:
    """The networks that are called as a whole: this one, or those that it holds."""
    if type(module).forward is not nn.Module.forward:
        return [module]
    return [unit for child in module.children() if next(child.parameters(), None) is not None for unit in _called(child)]


def _low(module: nn.Module) -> list[nn.Module]:
    """The largest parts of a network none of whose weights is in float32."""
    dtypes = {weight.dtype for weight in module.parameters()}
    if torch.float32 not in dtypes:
        return [module] if dtypes else []
    return [part for child in module.children() for part in _low(child)]


@contextlib.contextmanager
def whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Networks with all of their weights in every process."""
    units = [unit for module in modules for unit in module.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def full(tensor: Tensor) -> Tensor:
    """A tensor that may be split, whole in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def finite(tensors: Any) -> bool:
    """Whether what this process holds of some tensors (in dictionaries or lists) is finite."""
    own = [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in tree_leaves(tensors)]
    return all(bool(part.isfinite().all()) for part in own)


@contextlib.contextmanager
def joined(*, share: int | None = None, offload: bool = False) -> Iterator[Ranks]:
    """Take part in the run that this process was launched for. `share` ranks have one copy of every network between them; null is those of a node.

    A process that fails ends the others. The first one to fail says why, and they end without a word of their own.

    Raises:
        UserError: `share` does not divide the processes; they were launched with settings that nobody reads; a process of the run has
            ended (code 1).
    """
    unread = [name for name, idle in UNREAD.items() if os.environ.get(f"ACCELERATE_{name}", idle).lower() != idle]
    if unread:
        raise UserError(
            f"accelerate's {', '.join(unread).lower()} is set, which training does not follow; leave it out of `accelerate launch` and its "
            "configuration file: the recipe says the precision, and --share how networks are split"
        )
    here = place()
    if not here.launched and {"MASTER_ADDR", "ACCELERATE_USE_CPU"} <= os.environ.keys():
        raise UserError(
            "`accelerate launch --cpu` starts one process whatever --num_processes says; give --multi_gpu in its place, with or without GPUs"
        )
    size = here.size
    if size == 1 and not offload:
        if share not in (None, 1):
            raise UserError(f"--share {share} needs as many processes; start them with `torchrun` or `accelerate launch`")
        yield Ranks()
        return
    share = share or here.local_size
    if size % share:
        raise UserError(f"{size} processes do not split into groups of {share}; give a --share that divides them")
    store, rank = _rendezvous(here.launched)
    if device().type == "cuda":
        torch.cuda.set_device(here.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    dist.init_process_group(backend, store=PrefixStore("ranks", store), rank=rank, world_size=size, timeout=PATIENCE)
    mesh = init_device_mesh(device().type, (size // share, share), mesh_dim_names=("copies", "share"))
    ranks = Ranks(rank, size, mesh, offload, store)
    try:
        with ranks.failing_together():
            yield ranks
    except Exception as error:
        _linger(ranks)
        if isinstance(error, EndedElsewhereError):
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


def _linger(ranks: Ranks) -> None:
    """Do not take the reason away before the others have heard it: the first process may be the one that keeps the store."""
    with contextlib.suppress(dist.DistError):
        if ranks.store.add("heard", 1) == ranks.size:
            ranks.store.set("heard by all", "")
        elif ranks.first:
            ranks.store.wait(["heard by all"], timedelta(seconds=3))


def _rendezvous(launched: bool) -> tuple[Any, int]:
    """A store that all processes read and write, and this one's number."""
    if not launched:
        return dist.HashStore(), 0  # type: ignore[attr-defined]
    store, rank, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    return store, rank
