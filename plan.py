"""What can be trained in the time and the memory that there are.

A plan is a choice among `SHAPES`, by the rule in `choose`; bench/plan.py measures what it rests on.
"""
import os
import sys
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Shape(NamedTuple):
    """What a run trains, and how much of it at once."""
    layers: int
    width: int                               # channels of the residual stream
    context: int                             # tokens of a sequence
    vocab: int                               # of a new tokenizer
    tokens: int                              # of a step


# From little time to much. Between neighbours the time of a step grows about fourfold.
SHAPES = (
    Shape(2, 96, 64, 1024, 768),
    Shape(4, 128, 64, 2048, 1024),
    Shape(4, 192, 128, 2048, 2048),
    Shape(6, 256, 128, 4096, 4096),
    Shape(6, 384, 256, 4096, 8192),
    Shape(8, 512, 256, 8192, 16384),
    Shape(12, 768, 512, 16384, 65536),
    Shape(12, 768, 1024, 32768, 262144),
)
STEPS = 600                                  # fewer do not pay for a larger shape
EPOCHS = 8                                   # more passes over a text teach little
BYTES = 3                                    # of text in a token, before there is a tokenizer


def choose(shapes, seconds: float, size: int, step_seconds) -> tuple[Shape, float, float]:
    """The largest shape that gets STEPS steps in the time: (shape, its seconds a step, seconds).

    The time is cut to EPOCHS passes over `size` bytes of text. step_seconds(shape, enough): how
    long a step takes; a shape that needs more than `enough` need not be measured to the end.
    """
    best = None
    for shape in shapes:
        each = step_seconds(shape, seconds / STEPS)
        most = min(seconds, EPOCHS * size / BYTES / shape.tokens * each)
        if best and most / each < STEPS:
            break
        best = shape, each, most
    return best


# ------------------------------------------------------------------------------------------ memory


def activation_bytes(loss: nn.Module, context: int) -> int:
    """Bytes that a sequence keeps in fp32 for the backward pass of a loss on the meta device."""
    tokens = torch.zeros((1, context), dtype=torch.int64, device="meta")
    own, kept = {p.untyped_storage()._cdata for p in loss.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage      # held, so that no other gets its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss({"tokens": tokens, "targets": tokens})
    return sum(storage.nbytes() for storage in kept.values())


def gathered_bytes(loss: nn.Module, run) -> int:
    """Bytes of the weights that FSDP has whole at a time, and of their gradients: what is outside
    of the blocks, and two blocks, as the next is gathered while one computes."""
    blocks = next(module for module in loss.modules() if isinstance(module, nn.ModuleList))
    inside, block = (sum(p.numel() for p in m.parameters()) for m in (blocks, blocks[0]))
    outside = sum(p.numel() for p in loss.parameters()) - inside
    return 2 * run.dtype.itemsize * (outside + 2 * block)


def free_bytes(device: torch.device) -> int | None:
    """Memory that this device has left; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    names = getattr(os, "sysconf_names", {})
    pages = next((n for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if n in names), None)
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else None


def plan_memory(settings, run, loss: nn.Module, sequences: int, held: int, learn: int) -> None:
    """Say what training needs beside what there is, and set how many sequences go at once.

    loss: of the model, on the meta device. sequences: of a step, in all processes. held: parameters
    in memory; learn: those of them with a gradient and Adam's two moments.
    """
    each = activation_bytes(loss, settings.context)
    each = int(each * (0.6 if run.dtype != torch.float32 else 1.0))     # half of most, not of all
    if settings.checkpoint_activations:
        each //= 4
    parts = run.world if run.sharded else 1
    free, most = free_bytes(run.device), -(-sequences // run.world)
    fixed = (4 * held + 12 * learn) // parts + gathered_bytes(loss, run) * (parts > 1)
    if settings.micro_batch is None:
        room = (0.7 * free - fixed) / each if free else 8
        most = max(1, min(most, 16384 // settings.context, int(room)))
        settings.micro_batch = 1 << (most.bit_length() - 1)             # a power of two
    need, gb = fixed + each * settings.micro_batch, 1 << 30
    held, learn = held / parts, learn / parts
    run.say(f"memory     about {need / gb:.2f} GB: parameters {4 * held / gb:.2f}, gradients "
            f"{4 * learn / gb:.2f}, Adam {8 * learn / gb:.2f}, activations "
            f"{each * settings.micro_batch / gb:.2f}"
            + (f", gathered {gathered_bytes(loss, run) / gb:.2f}, in each of {parts} processes"
               if parts > 1 else "")
            + (f"; {free / gb:.1f} GB are free" if free else ""))
    if free and need > free:
        run.say(f"warning    that is more than there is: try {smaller(settings)}")


def smaller(settings) -> str:
    """The next setting that needs less memory."""
    if settings.micro_batch > 1:
        return f"--micro-batch {settings.micro_batch // 2}"
    if not settings.checkpoint_activations:
        return "--checkpoint-activations"
    return f"--context {settings.context // 2}"


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has used: of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:                      # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def checkpoint_blocks(model) -> None:
    """Recompute the activations of each block in the backward pass instead of keeping them."""
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for block in blocks:
        def recompute(*arguments, forward=block.forward):
            if torch.is_grad_enabled():
                return checkpoint(forward, *arguments, use_reentrant=False)
            return forward(*arguments)
        block.forward = recompute
