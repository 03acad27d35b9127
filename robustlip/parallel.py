"""Training in several processes: collective operations, and matrices that are each processed by one of the processes.

Matrix operations (orthogonalisation, caps, norms) need whole matrices and cost the cube of their size, so they are distributed: every matrix has
an owner, which receives the whole matrix, computes, and sends the result to the others. With 'ddp' every process has whole weights, and results
are sent to all; with 'fsdp' weights, gradients and momenta are sharded into blocks of rows (DTensors, Shard(0)), and only blocks are sent.
All operations are collective: all processes call them in the same order, also after an error in one of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustlip.errors import BadInput, RobustlipError

T = TypeVar("T")

MODES = ("ddp", "fsdp")

# At the end of a run the first process writes and bounds the model while the others wait: longer than torch's ten minutes for GPUs.
_PATIENCE = timedelta(hours=2)
_LINGER = 0.2  # seconds


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor (n, …), sharing memory with it; any other tensor is returned unchanged."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them: 0 ≤ rank < size. sharded: weights are DTensors (fsdp). device: of this process."""

    rank: int = 0
    size: int = 1
    sharded: bool = False
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """The process that prints and writes."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This process's share of `count` rows: shares differ by at most one row, and may be empty."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def shard(self, count: int, rank: int) -> int:
        """The number of rows on a rank if `count` rows are sharded by torch: blocks of ⌈count/size⌉ rows; the last may be smaller or empty."""
        block = -(-count // self.size)
        return max(0, min(block, count - rank * block))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, on all of them: same shape, dtype and device."""
        if self.size == 1:
            return values
        summed = values.detach().to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over all processes; NaN counts as infinity."""
        if self.size == 1:
            return values
        most = values.detach().to(self.device, copy=True)
        most = torch.where(most.isnan(), torch.inf, most)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most.to(values.device)

    def on_all(self, work: Callable[[], T]) -> T:
        """Runs `work` on each process and returns its own result. An exception on any process is raised on all: the one of the lowest rank.

        `work` itself must not be collective. An exception that is not a RobustlipError reaches the others as one that names the rank.
        """
        if self.size == 1:
            return work()
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = torch.tensor([error is not None], dtype=torch.float32, device=self.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if not bool(failed):
            return cast(T, result)
        errors: list[Exception | None] = [None] * self.size
        ours = error is None or isinstance(error, RobustlipError)
        dist.all_gather_object(errors, error if ours else RobustlipError(f"process {self.rank} failed: {type(error).__name__}: {error}"))
        rank, first = next((r, e) for r, e in enumerate(errors) if e is not None)
        raise error if error is not None and rank == self.rank else first

    def on_first(self, work: Callable[[], object]) -> None:
        """Run `work` on the first process only; its exceptions are raised on all."""
        self.on_all(work if self.first else lambda: None)

    def broadcast(self, value: T) -> T:
        """The first process's value, on all processes: anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device(self.device))
        return box[0]

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the first process, to be written; the result on other processes must not be used."""
        if not self.sharded:
            return tensors
        whole: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            # One after the other, so that a process has at most one whole tensor on its device.
            full = cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.first:
                whole[name] = full.detach().cpu()
        return whole

    def shard_like(self, whole: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, which every process has, in the layout of `like`: sharded, or unchanged."""
        if not hasattr(like, "device_mesh"):
            return whole
        from torch.distributed.tensor import distribute_tensor

        sharded = cast(Any, like)
        return distribute_tensor(whole.to(self.device), sharded.device_mesh, sharded.placements, src_data_rank=None)

    def wrap(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """The module with forward and backward passes over all processes, each with its own rows; gradients are averaged over processes.

        'fsdp': the parameters of each of `blocks`, and then all others, are gathered while they are needed. They become new DTensors, so
        optimisers and constraints have to be created afterwards.
        """
        if self.size == 1:
            return module
        if not self.sharded:
            return nn.parallel.DistributedDataParallel(module)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        for part in (*blocks, module):
            # Also for the last block: after an evaluation, which has no backward pass, parameters must be sharded again.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        return module

    def assign(self, batches: Sequence[Sequence[tuple[tuple[int, ...], float]]]) -> list[Assignment]:
        """Owners for the matrices of each batch, given as (whole shape (m, n), cost). The most expensive batch comes first; each matrix goes to the
        process with the least work so far."""
        load = [0.0] * self.size
        assignments: dict[int, Assignment] = {}
        for b in sorted(range(len(batches)), key=lambda b: -max(cost for _, cost in batches[b])):
            owners: list[int] = []
            for _, cost in batches[b]:
                owners.append(min(range(self.size), key=lambda rank: load[rank]))
                load[owners[-1]] += cost
            assignments[b] = Assignment(self, tuple(shape for shape, _ in batches[b]), tuple(owners))
        return [assignments[b] for b in range(len(batches))]


ALONE = World()


@dataclass(frozen=True)
class Assignment:
    """Matrices of whole shapes (m, n) and one dtype, each with the rank of its owner.

    A part is what one process has of a matrix: all of it, or its rows if the world is sharded.
    """

    world: World
    shapes: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]

    @property
    def mine(self) -> list[int]:
        return [i for i, owner in enumerate(self.owners) if owner == self.world.rank]

    def collect(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """From the parts of all matrices: the whole matrices that this process owns, by number. Not sharded: the parts themselves, not copies."""
        if not self.world.sharded:
            return {i: parts[i] for i in self.mine}
        send = [[parts[i] for i in owned] for owned in self._owned()]
        received = self._exchange(send, [[self._part_shape(i, rank) for i in self.mine] for rank in self._ranks()], parts[0])
        return {i: torch.cat(blocks) for i, *blocks in zip(self.mine, *received, strict=True)}

    def distribute(self, whole: dict[int, Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """The owners' results, on every process, in the layout of `parts`, whose values are not used. If not sharded, an owner gets its own
        result, not a copy."""
        if self.world.size == 1:
            return list(whole.values())
        owned = self._owned()
        if self.world.sharded:
            blocks = {i: matrix.split([self._part_shape(i, rank)[0] for rank in self._ranks()]) for i, matrix in whole.items()}
            send = [[blocks[i][rank] for i in self.mine] for rank in self._ranks()]
            received = self._exchange(send, [[tuple(parts[i].shape) for i in numbers] for numbers in owned], parts[0])
        else:
            received = self._to_everybody([whole[i] for i in self.mine], [[self.shapes[i] for i in numbers] for numbers in owned], parts[0])
            received[self.world.rank] = [whole[i] for i in self.mine]
        by_number = {i: matrix for numbers, matrices in zip(owned, received, strict=True) for i, matrix in zip(numbers, matrices, strict=True)}
        return [by_number[i] for i in range(len(parts))]

    def _owned(self) -> list[list[int]]:
        """Numbers of the matrices of each rank."""
        return [[i for i, owner in enumerate(self.owners) if owner == rank] for rank in self._ranks()]

    def _ranks(self) -> range:
        return range(self.world.size)

    def _part_shape(self, i: int, rank: int) -> tuple[int, ...]:
        return (self.world.shard(self.shapes[i][0], rank), *self.shapes[i][1:])

    def _exchange(self, send: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], like: Tensor) -> list[list[Tensor]]:
        """Sends tensors to each rank; returns those from each rank, of these shapes. One message per rank."""
        out = _flat([tensor for tensors in send for tensor in tensors], like)
        sizes = [sum(map(_count, of_rank)) for of_rank in shapes]
        received = like.new_empty(sum(sizes))
        dist.all_to_all_single(received, out, sizes, [sum(t.numel() for t in tensors) for tensors in send])
        return [_shaped(part, of_rank) for part, of_rank in zip(received.split(sizes), shapes, strict=True)]

    def _to_everybody(self, send: list[Tensor], shapes: list[list[tuple[int, ...]]], like: Tensor) -> list[list[Tensor]]:
        """Sends tensors of this process to all; returns those of each rank, of these shapes. One message, padded to the longest."""
        sizes = [sum(map(_count, of_rank)) for of_rank in shapes]
        padded = like.new_zeros(max(sizes))
        padded[: sizes[self.world.rank]] = _flat(send, like)
        received = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(received, padded)
        return [_shaped(part[:size], of_rank) for part, size, of_rank in zip(received, sizes, shapes, strict=True)]


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors]) if tensors else like.new_empty(0)


def _shaped(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split([_count(shape) for shape in shapes]), shapes, strict=True)]


def launched() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of processes) from the environment variables of torchrun; (0, 0, 1) without them.

    Raises BadInput if some of the variables are missing.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return 0, 0, 1
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ[key]
        return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), size
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"expected WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them, got {error}; "
            f"start it by torchrun, or unset them"
        ) from None


@contextmanager
def joined(device: str = "cpu", parallel: str = "ddp") -> Iterator[World]:
    """The world in which torchrun started this process, joined for the block: gloo on CPUs, nccl on GPUs, process i of a machine on its GPU i.

    With one process there is no process group, and `parallel` has no effect. An existing process group is used and not closed.
    Raises BadInput for an unknown mode and for a machine with fewer GPUs than processes.
    """
    if parallel not in MODES:
        raise BadInput(f"expected a parallel mode among {', '.join(MODES)}, got {parallel!r}; name one of them")
    rank, on_machine, size = launched()
    if size == 1:
        yield World(device=device)
        return
    where = torch.device(device)
    if where.type == "cuda":
        if device != "cuda" or on_machine >= torch.cuda.device_count():
            raise BadInput(
                f"expected one GPU for each process, got device {device!r} and {torch.cuda.device_count()} GPUs for process {on_machine} of this "
                f"machine; use --device cuda with as many processes as GPUs, or --device cpu"
            )
        where = torch.device("cuda", on_machine)
        torch.cuda.set_device(where)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=_PATIENCE)
    world = World(rank, size, parallel == "fsdp", str(where))
    try:
        yield world
    except RobustlipError:
        # Raised on all processes. After any other exception the others may be inside a collective and never leave it; torchrun ends them.
        if mine:
            _leave()
        raise
    if mine:
        dist.barrier()
        _leave()


def _leave() -> None:
    # gloo's threads still hold tensors of finished collectives, and need the interpreter to release them: a process that exits before that
    # is aborted (torch 2.13; DDP keeps the group, and so its threads, alive).
    time.sleep(_LINGER)
    dist.destroy_process_group()
