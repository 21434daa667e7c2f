"""One training on many processes: gradients reduced during the backward pass, or weights in shards.

    whole = shard(loss, run)                 --shard: FSDP2, which divides weights over processes
    loss = overlapping(loss, run)            else DistributedDataParallel
    for batch, real, last in in_step(run, batches): ...   as many on every process
    with gathered(whole, loss, run) as model: ...         rank 0 has all weights, on its disk
    with saving(loss, optimizer, run, out, step) as folder: ...

Without --shard each process holds everything, and the gradients of one part of the model are summed
while those of the part before it are still computed. With --shard (FSDP2) each parameter, its
gradient and its moments are divided by rows: of N processes each holds 1 / N. A block's weights are
gathered just before it computes and dropped after; what is outside of the blocks stays gathered
during a step. No process ever holds all weights: a new model is drawn, a checkpoint is read and the
result is written one block or one parameter at a time.

References: Li et al. 2020, "PyTorch Distributed"; Rajbhandari et al. 2020, "ZeRO"; Zhao et al.
2023, "PyTorch FSDP".
"""
import contextlib
import copy
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import saved_shards

# torch's parts for shards are imported where they are used: they take as long as half of torch.
# What is called from outside and computes with parameters, which must be gathered as for forward:
METHODS = "generate", "measures", "sample", "remember_start"

# ------------------------------------------------------------------------------------- in a step


def overlapping(loss: nn.Module, run, partial: bool = False) -> nn.Module:
    """The loss, whose gradients are averaged over the processes in buckets, each as soon as the
    backward pass has filled it. partial: some parameters take no part in the loss."""
    if run.world == 1 or run.sharded:
        return loss
    return DistributedDataParallel(loss, find_unused_parameters=partial, broadcast_buffers=False)


def in_step(run, batches: list):
    """Yield (micro-batch, 1 or 0, whether it is the last). Sharded processes compute in step, so
    whoever has fewer micro-batches than another repeats its last one, which counts 0."""
    rounds = len(batches)
    if run.sharded:
        most = torch.tensor(rounds, device=run.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        rounds = int(most)
    for n in range(rounds):
        yield batches[min(n, len(batches) - 1)], int(n < len(batches)), n == rounds - 1


def reducing(loss, now: bool):
    """Within, gradients of what is computed are averaged over the processes only if `now`: at the
    last micro-batch of a step. (Shards always are: a whole gradient would not fit.)"""
    if isinstance(loss, DistributedDataParallel) and not now:
        return loss.no_sync()
    return contextlib.nullcontext()


def number(norm: torch.Tensor) -> float:
    """The number that a tensor holds, which may be in parts on several processes."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def agree(run, value):
    """What rank 0 says, on all processes."""
    values = [value]
    if run.world > 1:
        dist.broadcast_object_list(values, 0, device=run.device)
    return values[0]

# ---------------------------------------------------------------------------------------- sharding


def shard(root: nn.Module, run) -> nn.Module:
    """Divide the parameters of a loss over all processes, in fp32; a copy on the meta device.

    root.model may lie on the meta device: it is drawn here, block by block. Or its tensors may be
    mapped from files: then of each only this process's rows are read, one block at a time.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    from torch.distributed.tensor import DTensor
    whole = empty_copy(root)
    policy = MixedPrecisionPolicy()
    if run.dtype != torch.float32:           # positions and what else is fp32 between blocks stay
        policy = MixedPrecisionPolicy(run.dtype, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(run.device.type, (run.world,))
    blocks = [block for m in root.modules() if isinstance(m, nn.ModuleList) for block in m]
    for unit in (*blocks, root):
        inside = {id(p) for p in unit.parameters()}
        names = {name: p for name, p in root.named_parameters()
                 if id(p) in inside and not isinstance(p, DTensor)}
        values = drawn(whole, names) if any(p.is_meta for p in names.values()) else names
        made = {id(p): nn.Parameter(values[name].detach().to(run.device, torch.float32),
                                    p.requires_grad) for name, p in names.items()}
        for module in unit.modules():        # a tied weight in both places
            for leaf, p in [*module._parameters.items()]:
                if id(p) in made:
                    setattr(module, leaf, made[id(p)])
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    root.generate = root.model.generate
    for name in METHODS:
        if hasattr(root, name):
            register_fsdp_forward_method(root, name)
    root.model.generate = root.generate
    return whole


def empty_copy(root: nn.Module) -> nn.Module:
    """A copy on the meta device, which shares all that is no module or tensor."""
    kept = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in root.parameters()}
    kept |= {id(value): value for name, value in vars(root).items() if not name.startswith("_")}
    return copy.deepcopy(root, kept)


def drawn(whole: nn.Module, names) -> dict[str, nn.Parameter]:
    """Initial values of these parameters, by the model's own `initialise`, in a copy that has no
    memory for the others. They do not depend on the number of processes."""
    some = empty_copy(whole)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        shape = some.get_parameter(name).shape
        setattr(some.get_submodule(owner), leaf, nn.Parameter(torch.empty(shape)))
    some.model.initialise()
    return {name: some.get_parameter(name) for name in names}


def own_rows(p, tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a whole tensor that this process holds of a sharded parameter."""
    parts, n = tensor.chunk(p.device_mesh.size()), p.device_mesh.get_local_rank()
    return parts[n] if n < len(parts) else tensor[:0]


@torch.no_grad()
def load_rows(root: nn.Module, whole: nn.Module) -> None:
    """Set sharded parameters from a loss whose tensors are mapped from files: its rows are read."""
    root.reshard()
    tensors = dict(whole.named_parameters())
    for name, p in root.named_parameters():
        p.to_local().copy_(own_rows(p, tensors[name]))


@contextlib.contextmanager
def gathered(whole: nn.Module, root: nn.Module, run):
    """A loss with all weights, to be written by rank 0: `root` itself, or the copy that `shard`
    made, with weights in files mapped to memory, gathered one after another."""
    if whole is root:
        yield root
        return
    root.reshard()
    with tempfile.TemporaryDirectory(dir=run.out, prefix="gathered-") as folder:
        sharded = dict(root.named_parameters())
        for n, (name, p) in enumerate([*whole.named_parameters()]):
            full = sharded[name].detach().full_tensor()
            if run.rank == 0:
                file = torch.from_file(f"{folder}/{n}", shared=True, size=p.numel(), dtype=p.dtype)
                p = nn.Parameter(file.view(p.shape).copy_(full), p.requires_grad)
                replace(whole, name, p)
        yield whole
        for name, p in whole.named_parameters():
            replace(whole, name, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))


def replace(root: nn.Module, name: str, new: nn.Parameter) -> None:
    """Put another parameter where this one is, a tied one in all its places."""
    old = root.get_parameter(name)
    for module in root.modules():
        for leaf, p in [*module._parameters.items()]:
            if p is old:
                setattr(module, leaf, new)

# ------------------------------------------------------------------------------------- checkpoints


def state_of(root: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """Parameters and the optimiser's tensors by name, for torch.distributed.checkpoint."""
    root.reshard()
    state = {}
    for name, p in root.named_parameters():
        state[name] = p.detach()
        state |= {f"{name} {key}": value for key, value in optimizer.state[p].items()}
    return state


@contextlib.contextmanager
def saving(root: nn.Module, optimizer, run, out: Path, step: int):
    """Where a resumed run will look: `resume`, or with shards the folder resume/step-N, for which
    every process writes its own. What rank 0 adds within is part of it: the folder gets its name
    when all is there, so a kill leaves the one before."""
    done = out / "resume" / f"step-{step}"
    part = Path(f"{done}.part")
    if not run.sharded:
        yield out / "resume"
        return
    import torch.distributed.checkpoint as dcp
    if run.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    dcp.save(state_of(root, optimizer), checkpoint_id=str(part))
    yield part
    if run.rank == 0:
        if done.exists():                    # saved twice after one step
            shutil.rmtree(part)
        else:
            os.replace(part, done)
        for other in saved_shards(out):
            if other != done:
                shutil.rmtree(other)
    dist.barrier()


def load_shards(root: nn.Module, optimizer, folder: Path) -> None:
    """What processes wrote with `saving`, on any number of them."""
    import torch.distributed.checkpoint as dcp
    known = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    for name, p in root.named_parameters():  # of a new optimiser: places to read into
        keys = [key.removeprefix(f"{name} ") for key in known if key.startswith(f"{name} ")]
        like, place = p.detach(), p.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[p] = {key: torch.zeros((), device=place) if key == "step"
                              else torch.zeros_like(like) for key in keys}
    dcp.load(state_of(root, optimizer), checkpoint_id=str(folder))

# ---------------------------------------------------------------------------------- a lost process


def restarted(settings, given: set[str]) -> bool:
    """Whether torchrun has restarted this command (--max-restarts) as a process was lost, so that
    --out is this run's own. If it has saved something it resumes, whatever flags are repeated."""
    if not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) or settings.resume:
        return False
    if not settings.out:
        raise ValueError("torchrun --max-restarts needs --out DIR, where a restarted run finds "
                         "itself")
    folder = Path(settings.out, "resume")
    mark = folder / "torchrun"
    first = not int(os.environ["TORCHELASTIC_RESTART_COUNT"])           # of several machines, one
    if first and os.environ.get("GROUP_WORLD_SIZE", "1") == "1" or not mark.exists() \
            or mark.read_text(encoding="utf-8") != this_torchrun():     # counts, the others do not
        return False
    if saved_shards(folder.parent) or (folder / "resume.pt").exists():
        settings.resume = settings.out
        given.clear()
    return True


def this_torchrun() -> str:
    """What stays the same when torchrun restarts a command, and differs in another torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")                # --rdzv-id
    if name != "none":
        return name
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return f"process {os.getppid()}"
    return f"{os.environ['MASTER_ADDR']} {os.environ['MASTER_PORT']}"   # of several machines


def mark_run(out: Path) -> None:
    """Note in a new run directory which torchrun made it."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        (out / "resume").mkdir(exist_ok=True)
        (out / "resume" / "torchrun").write_text(this_torchrun(), encoding="utf-8")
