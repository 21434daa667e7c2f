"""Train any model of this project: `python train.py` works on any machine, offline, on real text.

With no argument it reads the source of Python's standard library, trains a tokenizer on it and a
small GPT, shows what it does, and leaves a run directory (out/gpt) that `python chat.py out/gpt`
talks to and transformers opens. Every setting is a flag: see `python train.py --help`.

From the top: settings; data; loss; the step; what the settings lead to; `train`, with the loop.
Beside it: flags.py makes flags of the settings, process.py knows device, clock and the other
processes, plan.py chooses sizes, checkpoints.py reads and writes what lies on disk.
To change the data, see `Batches`; the loss, `NextTokenLoss`; the optimiser, `make_optimizer`; the
schedule, `learning_rate`. finetune.py imports what it needs from here.

The recipe is stated in tokens per step: how many sequences go through the model at once, and how
often gradients are accumulated, follows from it, on one process or on many (torchrun). Parameters
are fp32 and computed with under autocast. The order of the data depends on the seed and the step
alone, dropout also on the number of processes: with --steps, a resumed run gives the same bits.
"""
import time

STARTED = time.time()                        # --minutes counts from here: torch takes seconds

import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import shlex
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cluster
import data
import tokenizer as text
from card import write_card
from checkpoints import (MODELS, can_draw, check_vocabulary, config_values, curve, draw_log,
                         identify, is_out_of_memory, load_checkpoint, load_resume,
                         make_run_directory, measured, model_parts, publish, resume_settings,
                         save_resume, saved_tokenizer, write_settings, write_text)
from flags import complain, flag, parse_settings, show_any_text
from hub import locate
from plan import (BYTES, EPOCHS, SHAPES, Shape, checkpoint_blocks, choose, peak_bytes, plan_memory,
                  smaller)
from process import Interrupt, Pace, Run, clock, seconds_of, start_run

# ---------------------------------------------------------------------------------------- settings

MINUTES = 2.75                               # of a run for which nothing was said

@dataclass
class Common:
    """Settings of train.py and finetune.py. Each is a flag; None: it was not given."""
    data: list[str] = flag([], "text files, .jsonl with \"text\", folders or patterns of them, or "
                           "a folder with train.bin and val.bin (without: the source of Python's "
                           "standard library)")
    val: list[str] = flag([], "files to validate on (without: a part of the data is held out)")
    split_seed: int = flag(0, "decides what is held out")
    encoding: str | None = flag(None, "of the text files (UTF-8, or as their first bytes say)")
    tokenizer: str | None = flag(None, "folder, file or name (without: a new one is trained)")
    context: int | None = flag(None, "tokens in a training sequence (planned; with --size or "
                               "--init-from the model's, 1024 at most)", "block_size", low=2)
    config: list[str] = flag([], "config fields as field=value, for what has no flag of its own")
    out: str | None = flag(None, "the run directory (out/MODEL, then out/MODEL-2, ...)")
    steps: int | None = flag(None, "optimiser steps", "max_iters", low=1)
    epochs: float | None = flag(None, "instead of --steps: passes over the data", above=0)
    micro_batch: int | None = flag(None, "sequences at once (what fits)", low=1)
    lr: float | None = flag(None, "peak learning rate", "learning_rate", above=0)
    final_lr: float = flag(0.05, "learning rate at the end, as a fraction of the peak", low=0,
                           high=1)
    warmup: int | None = flag(None, "steps of linear warm-up (a tenth)", low=0)
    keep: str = flag("best", "whose weights the run directory holds: those of the best validation, "
                     "or the last", choices=("best", "last"))
    weight_decay: float = flag(0.1, "decay of the matrices", low=0)
    clip: float = flag(1.0, "largest norm of the gradient", above=0)
    seed: int = flag(0, "decides initial weights, order of the data, dropout, samples", low=0)
    device: str | None = flag(None, "cuda, mps or cpu (the first of them there is)")
    dtype: str | None = flag(None, "precision of the computation (as fast as is safe)",
                             choices=("float32", "bfloat16", "float16"))
    compile: str = flag("auto", "compile the step; auto does on CUDA",
                        choices=("auto", "on", "off"))
    checkpoint_activations: bool = flag(False, "save memory: recompute activations in the backward "
                                        "pass")
    eval_every: int | None = flag(None, "steps between validations (a tenth)", low=1)
    sample_every: int | None = flag(None, "steps between samples (a third)", low=1)
    save_minutes: float = flag(5.0, "minutes between saves", low=0)
    init_from: str | None = flag(None, "start from this checkpoint, with its tokenizer: folder, "
                                "file, or a name to be downloaded, as openai-community/gpt2")
    shard: bool = flag(False, "divide weights, gradients and moments over the processes that "
                       "torchrun started (FSDP)")
    resume: str | None = flag(None, "go on with this run directory, bit-exactly")
    eval_only: bool = flag(False, "validate and stop: nothing is written but the token cache")
    settings: str | None = flag(None, "take settings from this file (a run's settings.json)")


@dataclass
class Settings(Common):
    """Settings of train.py alone."""
    model: str = flag("gpt", "which architecture", choices=MODELS)
    size: str | None = flag(None, "a published size of it, by its name in SIZES")
    layers: int | None = flag(None, "number of blocks (planned)", low=1)
    width: int | None = flag(None, "channels of the residual stream (planned)", low=1)
    vocab: int | None = flag(None, "size of a new vocabulary, specials too (planned)", low=257)
    minutes: float | None = flag(None, "instead of --steps: all the time it takes, from "
                                 f"command to end ({MINUTES}; {EPOCHS} epochs if less)", low=0.05)
    plan: bool = flag(False, "say what was planned, and stop")
    optimizer: str | None = flag(None, "of the matrices inside the blocks (muon; with "
                                 "--init-from adamw)", choices=("muon", "adamw"))
    muon_lr: float = flag(0.02, "peak learning rate of Muon", above=0)
    tokens_per_step: int | None = flag(None, "tokens in a step (planned; with --size or "
                                       "--init-from 16384)", low=2)
    batch_size: int | None = flag(None, "instead of --tokens-per-step: sequences in a step", low=1)
    eval_tokens: int | None = flag(None, "tokens of a validation on the way (ten take a "
                                   "thirtieth of the time; the last reads up to 30 times as many)",
                                   low=1)
    sample_prompt: str | None = flag(None, "what samples begin with (the beginning of the held-out "
                                     "text)")
    workers: int | None = flag(None, "processes that pack text (as many as pay)", low=1)


# These do not change a training step: a resumed run may have others.
HARMLESS = {"out", "keep", "resume", "settings", "workers", "eval_every", "eval_tokens",
            "sample_every", "sample_prompt", "save_minutes"}


# -------------------------------------------------------------------------------------------- data


def standard_library() -> list[tuple[str, Path]]:
    """(name, path) of the source of Python's standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib",
            "lib2to3", "__pycache__"}
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    return sorted((name, path) for name, path in files if not skip & set(name.split("/")[:-1]))


@dataclass
class Corpus:
    """Token files and the tokenizer that made them."""
    tokenizer: text.Tokenizer
    train: np.ndarray                        # tokens, mapped from the file
    val: np.ndarray
    val_bytes: int                           # of UTF-8 text behind `val`
    key: str                                 # names the inputs: a resumed run must find the same


def prepare_corpus(settings: Settings, run: Run, tokenizer=None) -> Corpus:
    """Read, tokenize and split the data, or find that done in the cache (rank 0 does it first)."""
    if run.rank > 0:
        dist.barrier()
    place = settings.tokenizer or settings.init_from
    if tokenizer is None and place:
        tokenizer = text.load_tokenizer(settings.tokenizer or locate(settings.init_from))
    notices, folders = [], [path for path in settings.data if Path(path, "train.bin").exists()]
    if folders and len(settings.data) > 1:
        raise ValueError(f"--data {folders[0]} has token files: give it alone")
    if folders:
        corpus, what = read_token_folder(Path(folders[0]), tokenizer), folders[0]
    else:
        files, val = [path for _, path in standard_library()], []
        if settings.data:
            files, notices = data.find_files(settings.data, settings.encoding)
        if settings.val:
            val, more = data.find_files(settings.val, settings.encoding)
            notices += more
        vocabulary = f"bpe {settings.vocab}" if not place else json.dumps(
            {name: hashlib.blake2b(content).hexdigest()
             for name, content in tokenizer.files().items()})
        key = digest([*files, *val], vocabulary,
                     f"{settings.split_seed} {settings.encoding} {len(val)}")
        folder = Path(settings.out or "out/x").parent / "data" / key
        if not (folder / "done.json").exists():
            pack_corpus(files, val, tokenizer, folder, settings, run)
        corpus = read_token_folder(folder, tokenizer)
        corpus.key = key
        notices += text.read_json(folder / "done.json")["notices"]
        size = sum(path.stat().st_size for path in files)
        what = ", ".join(settings.data) or "the source of Python's standard library"
        what += f": {len(files)} files, {size / 1e6:.1f} MB"
    if run.rank == 0 and run.world > 1:
        dist.barrier()
    for split, tokens in (("train on", corpus.train), ("validate on", corpus.val)):
        if len(tokens) < 2:
            raise ValueError(f"{what}: {len(tokens)} tokens to {split}: give more text")
    run.say(f"data       {what}")
    for notice in notices:
        run.say(f"data       {notice}")
    run.say(f"tokens     {len(corpus.train):,} to train on, {len(corpus.val):,} held out "
            f"({corpus.val_bytes / len(corpus.val):.2f} bytes each); "
            f"vocabulary of {corpus.tokenizer.vocab_size}")
    return corpus


def digest(files: list[Path], *more: str) -> str:
    """A name for these inputs: of their contents (of files over 256 MB: size and time)."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in files:
        stat = path.stat()
        hashed.update(f"{stat.st_size} {stat.st_mtime_ns}".encode() if stat.st_size > 1 << 28
                      else hashlib.blake2b(path.read_bytes()).digest())
    hashed.update("\0".join(more).encode())
    return hashed.hexdigest()


def pack_corpus(files, val, tokenizer, folder: Path, settings: Settings, run: Run) -> None:
    """Fill a folder of the cache: tokenizer, train.bin, val.bin; done.json comes last."""
    notices, progress = [], sys.stderr.isatty()
    if tokenizer is None:
        run.say(f"tokenizer  training one of {settings.vocab} tokens")
        texts = data.sample(files, settings.encoding, settings.split_seed, whole=bool(val))
        tokenizer = text.train_bpe(texts, settings.vocab - 1, progress=progress, notices=notices)
    stats = data.pack(files, tokenizer, folder, settings.split_seed, settings.encoding,
                      settings.workers, progress, val)
    tokenizer.save(folder)
    write_text(folder / "done.json", json.dumps({"notices": notices + stats["notices"]}) + "\n")


def read_token_folder(folder: Path, tokenizer) -> Corpus:
    """A folder with train.bin and val.bin: ours, or nanoGPT's with --tokenizer or meta.pkl."""
    if tokenizer is None and (folder / "tokenizer_config.json").exists():
        tokenizer = text.load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has token files but no tokenizer: name it, as --tokenizer gpt2")
    splits = []
    for path in (folder / "train.bin", folder / "val.bin"):
        with open(path, "rb") as file:
            ours = file.read(1) == b"{"
        splits.append(data.open_tokens(path, tokenizer.vocab_size, headerless=not ours))
    (train, _), (val, header) = splits
    size = header.get("bytes") or len(tokenizer.decode(val.tolist()).encode())
    key = hashlib.blake2b(json.dumps([header for _, header in splits]).encode(), digest_size=8)
    return Corpus(tokenizer, train, val, size, key.hexdigest())


class Batches:
    """Sequences of a token file for each step: every token is a target once an epoch.

    Each epoch has another order. What a step sees depends on the seed and its number alone, on any
    number of processes. The last sequence of the file overlaps the one before; the overlap is no
    target.
    """

    def __init__(self, ids: np.ndarray, context: int, sequences: int, micro: int, seed: int,
                 run: Run):
        self.ids, self.context, self.seed, self.run = ids, min(context, len(ids) - 1), seed, run
        self.sequences, self.micro = sequences, micro                   # of a step; at once
        self.count = -(-(len(ids) - 1) // self.context)                 # of an epoch
        self.epoch, self.order = -1, None

    def sequence(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (T,) of the i-th sequence of the file; -100 is no target."""
        start = min(i * self.context, len(self.ids) - 1 - self.context)
        window = self.ids[start:start + self.context + 1].astype(np.int64)
        targets = window[1:].copy()
        targets[:i * self.context - start] = -100
        return window[:-1], targets

    def place(self, index: int) -> int:
        """Which sequence of the file is the index-th of all that training sees."""
        epoch, i = divmod(index, self.count)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        return int(self.order[i])

    def __call__(self, step: int) -> list[dict[str, torch.Tensor]]:
        """This process's micro-batches of a step: {"tokens", "targets"}, (b, T) int64 each."""
        mine, made = range(self.run.rank, self.sequences, self.run.world), []
        for first in range(0, len(mine), self.micro):
            pairs = [self.sequence(self.place(step * self.sequences + k))
                     for k in mine[first:first + self.micro]]
            tokens, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs))
            made.append({"tokens": tokens, "targets": targets})
        return made


def to_device(batch: dict, device: torch.device) -> dict:
    """Every tensor of a batch on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

# -------------------------------------------------------------------------------------------- loss


class NextTokenLoss(nn.Module):
    """The loss of pretraining: a batch -> (sum of the cross entropies in nats, number of targets).

    A module, so that what wraps modules (DDP, FSDP, torch.compile) can wrap it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, targets = self.model.hidden(batch["tokens"]), batch["targets"]      # (B, T, C)
        penalty = getattr(self.model, "L2WRAP", 0.0) if self.model.training else 0.0
        losses = token_losses(self.model, hidden.flatten(0, 1), targets.flatten(), penalty=penalty)
        return losses.sum(), (targets != -100).sum()


def token_losses(model, hidden: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0,
                 penalty: float = 0.0) -> torch.Tensor:
    """(N, C) hidden vectors and (N,) targets -> (N,) cross entropies, fp32; 0 where -100.

    In pieces: at most 256 MB of logits are kept. penalty, RWKV's L2Wrap: each position's largest
    logit m is pulled to 0 by the gradient of penalty * m²/2; the loss's value does not change.
    """
    def piece(h, y):
        logits = model.logits(h[None])[0].float() / temperature         # (n, V)
        losses = F.cross_entropy(logits, y, ignore_index=-100, reduction="none")
        if penalty:
            pull = 0.5 * penalty * logits.amax(-1).square() * (y != -100)
            losses = losses + pull - pull.detach()
        return losses
    rows = max(1, (1 << 26) // model.config.vocab_size)                 # logits of 256 MB in fp32
    keep = len(hidden) <= rows or not torch.is_grad_enabled()
    return torch.cat([piece(h, y) if keep else checkpoint(piece, h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(rows), targets.split(rows))])


@torch.no_grad()
def validate(model, run: Run, ids: np.ndarray, context: int, first: int, limit: int) -> float:
    """Nats a token over evenly spaced blocks of `ids`, `limit` tokens or so; `first` precedes.

    model: or its NextTokenLoss, which is what is sharded; then all processes compute in step.
    """
    loss = model if isinstance(model, NextTokenLoss) else NextTokenLoss(model)
    context = min(context, len(ids))
    starts = np.arange(0, len(ids), context)
    chosen = np.linspace(0, len(starts) - 1, max(1, min(len(starts), -(-limit // context))))
    starts = starts[np.unique(chosen.astype(np.int64))]
    most, starts = -(-len(starts) // run.world), starts[run.rank::run.world]
    total, count, was_training = 0.0, 0, model.training
    loss.eval()
    for group in np.array_split(starts, max(1, most * context // 8192)):
        tokens, targets = np.zeros((2, max(1, len(group)), context), np.int64)
        targets[:] = -100
        for row, start in enumerate(group):
            block = ids[start:start + context].astype(np.int64)
            tokens[row, 0] = first if start == 0 else ids[start - 1]
            tokens[row, 1:len(block)], targets[row, :len(block)] = block[:-1], block
        batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        with run.autocast():
            nats, known = loss(to_device(batch, run.device))
        total, count = total + nats.item(), count + known.item()
    loss.train(was_training)
    total, count = run.sum(total, count)
    return total / count


def compressed(corpus: Corpus) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9e need for the held-out text (its first 16 MB)."""
    ids = corpus.val[:8 << 20]
    held = corpus.tokenizer.decode(ids[ids != corpus.tokenizer.end_id].tolist()).encode()[:16 << 20]
    xz = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME,
          "dict_size": max(4096, len(held))}                # xz's own, 64 MB, would need 700 MB
    return {"gzip": 8 * len(gzip.compress(held, 9)) / len(held),
            "xz": 8 * len(lzma.compress(held, filters=[xz])) / len(held)}

# ---------------------------------------------------------------------------------------- the step


class Muon(torch.optim.AdamW):
    """AdamW, but groups that have "muon" are stepped by Muon (Jordan et al. 2024).

    The momentum of a matrix, U S Vᵀ, is replaced by U Vᵀ, or nearly, so that all directions move
    alike. Three steps of X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X with Jordan's coefficients bring the
    singular values near 1; more change little, and cost much on a CPU. The momentum is Nesterov's,
    and √(rows / columns) scales tall matrices. Matrices of one shape go together.
    """
    MOMENTUM, A, B, C = 0.95, 3.4445, -4.7750, 2.0315

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        super().step()
        self.param_groups = groups
        for group in groups:
            same_shape = {}
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    same_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in same_shape.items():
                for p, update in zip(parameters, self.updates(parameters)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def updates(self, parameters: list) -> torch.Tensor:
        """(n, rows, columns): the orthogonal updates of n matrices."""
        for p in parameters:
            if not self.state[p]:            # AdamW, when it is loaded, asks each state for a step
                self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            self.state[p]["momentum"].lerp_(p.grad, 1 - self.MOMENTUM)
        x = torch.stack([p.grad.lerp(self.state[p]["momentum"], self.MOMENTUM) for p in parameters])
        wide = x.shape[1] <= x.shape[2]
        x = x if wide else x.mT
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)               # singular values at most 1
        x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
        for _ in range(3):
            square = x @ x.mT
            inner = torch.baddbmm(square, square, square, beta=self.B, alpha=self.C)
            x = torch.baddbmm(x, inner, x, beta=self.A)
        return (x if wide else x.mT).to(parameters[0].dtype)


def make_optimizer(model, weight_decay: float, muon: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over the model's own groups and constants; fused where the device has it.

    muon: not 0, Muon's learning rate as a multiple of AdamW's; then the matrices inside the blocks
    are its.
    """
    groups = [group for group in model.parameter_groups(weight_decay) if group["params"]]
    for group in groups:
        if muon and group["hidden_matrix"]:
            group.update(muon=True, lr_scale=muon * group["lr_scale"])
    kind = Muon if muon else torch.optim.AdamW
    try:
        return kind(groups, lr=0.0, **model.OPTIMIZER, fused=True)
    except RuntimeError:
        return kind(groups, lr=0.0, **model.OPTIMIZER)


def learning_rate(settings: Common, step: float, steps: int) -> float:
    """Linear warm-up, then linear decay to final_lr of the peak. In a run by the clock, `step` is
    the part of its time that has passed, times `steps`."""
    warmup = steps // 10 if settings.warmup is None else settings.warmup
    if step < warmup:
        return settings.lr * min(1.0, (step + 1) / warmup)
    done = (step - warmup) / max(1, steps - warmup)
    return settings.lr * (1 - (1 - settings.final_lr) * min(1.0, done))


def training_step(run: Run, loss, optimizer, scaler, batches: list[dict], lr: float, clip: float,
                  nominal: float) -> tuple[float, float, float]:
    """One step of the optimiser on the mean over all targets of a step; `batches` are this
    process's micro-batches. Returns (mean loss, norm of the gradient, number of targets).

    Sums are accumulated, averaged over the processes, and divided once, by the number of targets on
    all processes: unequal micro-batches, and any number of processes, give the step of one large
    batch. Where loss or gradient are not finite, no parameter changes. nominal: about that number,
    so that fp16 holds the gradients meanwhile.
    """
    total, count = 0.0, 0
    for batch, real, last in cluster.in_step(run, batches):
        with run.autocast(), cluster.reducing(loss, last):
            nats, targets = loss(to_device(batch, run.device))
        scaler.scale(nats / nominal * real).backward()
        total, count = total + nats.detach() * real, count + targets * real
    total, count = run.sum(float(total), float(count))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(run.world * nominal / max(count, 1.0))
    scaler.unscale_(optimizer)
    norm = cluster.number(nn.utils.clip_grad_norm_(parameters, clip))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    mean = total / max(count, 1.0)
    if math.isfinite(mean) and math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean, norm, count


def compile_loss(asked: str, run: Run, loss, batch: dict):
    """The loss, compiled if asked for or worth it; a compiler that fails costs only a line."""
    if asked == "off" or run.sharded or (asked == "auto" and run.device.type != "cuda"):
        return loss
    try:
        fast = torch.compile(loss)
        with run.autocast():
            seconds = seconds_of(lambda: fast(to_device(batch, run.device))[0].backward())
        run.say(f"compile    done in {seconds:.0f} s")
    except Exception as error:               # missing compilers fail in many ways
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        run.say(f"compile    failed; continuing without ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0][:100]})")
        fast = loss
    loss.zero_grad(set_to_none=True)
    return fast


def shown(measures: dict[str, float]) -> str:
    """Measures on one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items())

# ----------------------------------------------------------------------- what the settings lead to


def plan_run(settings: Settings, run: Run) -> float | None:
    """Fill in the sizes and the time that were left open, by measurement (see plan.py), and say so;
    tokens per second. None, and nothing measured, where all of it was given or follows from a
    published size or a checkpoint.
    """
    if settings.size or settings.init_from:
        settings.vocab = settings.vocab or 4096
        return None
    made = settings.tokenizer or next(
        (path for path in settings.data if Path(path, "tokenizer_config.json").exists()), None)
    bounded = settings.steps or settings.epochs
    open_ended = not (bounded or settings.minutes)
    context = settings.context or (256 if open_ended else None)         # room to converse in
    asked = {"layers": settings.layers, "width": settings.width, "context": context,
             "vocab": text.load_tokenizer(made).vocab_size if made else settings.vocab,
             "tokens": settings.tokens_per_step}
    asked = {name: value for name, value in asked.items() if value}
    shapes = [shape._replace(**asked) for shape in SHAPES]
    if settings.batch_size:
        shapes = [shape._replace(tokens=settings.batch_size * shape.context) for shape in shapes]
    shapes = [*dict.fromkeys(shapes)]                                   # each once
    shape, speed = shapes[0], None
    if len(shapes) > 1 or not bounded:
        size = text_bytes(settings)
        shape, each, seconds = choose(
            shapes, 60 * (settings.minutes or MINUTES), size if open_ended else math.inf,
            lambda shape, enough: step_seconds(settings, run, shape, enough))
        speed, lasts = shape.tokens / each, ""
        if not bounded:
            settings.minutes = settings.minutes or round(seconds / 60, 2)
            epochs = speed * seconds * BYTES / size
            lasts = f": about {epochs:.1f} epochs in {settings.minutes:g} minutes"
        run.say(f"plan       {size / 1e6:.1f} MB of text; {speed:,.0f} tokens/s at {shape.layers} x"
                f" {shape.width}, context {shape.context}, vocabulary {shape.vocab}, "
                f"{shape.tokens} tokens a step{lasts}")
    settings.layers, settings.width = shape.layers, shape.width
    settings.context, settings.tokens_per_step = shape.context, shape.tokens
    settings.vocab, settings.batch_size = None if made else shape.vocab, None
    return speed


def step_seconds(settings: Settings, run: Run, shape: Shape, enough: float) -> float:
    """Seconds of a step of this shape: the least of up to four, or of one far over `enough`."""
    model_class, config_class, _ = model_parts(settings.model)
    config = config_class.sized(shape.layers, shape.width, shape.vocab, shape.context)
    values = config_values(config_class, settings.config)
    model = model_class(dataclasses.replace(config, **values)).to(run.device).train()
    muon = float(settings.optimizer != "adamw")
    optimizer, scaler = make_optimizer(model, settings.weight_decay, muon), run.scaler()
    rows = max(1, shape.tokens // shape.context // run.world)
    tokens = torch.randint(shape.vocab, (min(rows, max(1, 16384 // shape.context)), shape.context))
    batches = [{"tokens": tokens, "targets": tokens}] * -(-rows // len(tokens))
    loss, times = cluster.overlapping(NextTokenLoss(model), run), []
    try:
        while len(times) < 4 and min(times, default=0) < 3 * enough:
            took = seconds_of(lambda: training_step(run, loss, optimizer, scaler, batches, 0.0, 1.0,
                                                    shape.tokens))
            times.append(run.sum(took)[0] / run.world)                  # the same on all processes
    except RuntimeError as error:
        if is_out_of_memory(error):
            return math.inf
        raise
    return min(times)


def text_bytes(settings: Settings) -> float:
    """About how many bytes there are to train on."""
    if not settings.data:
        return sum(path.stat().st_size for _, path in standard_library())
    folders = [path for path in settings.data if Path(path, "train.bin").exists()]
    if folders:                              # two bytes a token
        return Path(folders[0], "train.bin").stat().st_size / 2 * BYTES
    return sum(path.stat().st_size for path in data.find_files(settings.data, settings.encoding)[0])


def check_settings(settings: Settings, given: set[str]) -> None:
    """ValueError for settings that exclude each other, before any work."""
    shaped = {name for name in ("layers", "width", "size") if getattr(settings, name)}
    if shaped and (settings.init_from or "size" in shaped and len(shaped) > 1):
        raise ValueError("--init-from, --size and --layers --width each decide the sizes: give one")
    if sum(bool(x) for x in (settings.steps, settings.minutes, settings.epochs)) > 1:
        raise ValueError("--steps, --epochs and --minutes each decide how long it takes: give one")
    if settings.tokens_per_step and settings.batch_size:
        raise ValueError("--tokens-per-step and --batch-size decide the same: give one")
    if "vocab" in given and (settings.tokenizer or settings.init_from):
        raise ValueError("--vocab is for a new tokenizer: --tokenizer and --init-from have theirs")
    if settings.shard:
        if settings.optimizer == "muon" or settings.compile == "on":
            raise ValueError("--shard needs --optimizer adamw, as Muon computes with whole "
                             "matrices, and --compile off")
        settings.optimizer = "adamw"
    sizes = model_parts(settings.model)[2]
    if settings.size and settings.size not in sizes:
        raise ValueError(f"--size {settings.size}: {settings.model} has {', '.join(sizes)}")
    if settings.init_from:
        found = identify(locate(settings.init_from))
        if "model" in given and settings.model != found:
            raise ValueError(f"--model {settings.model}: {settings.init_from} is {found}")
        settings.model = found


def derive(settings: Settings, given: set[str], run: Run, corpus: Corpus, speed: float | None):
    """Fill in the sizes and rates left open, say what was decided; (config, model or None).

    speed: tokens per second, if measured. Only --init-from has a model, with its weights, already.
    """
    model_class, config_class, sizes = model_parts(settings.model)
    tokenizer, model = corpus.tokenizer, None
    values = config_values(config_class, settings.config)
    context = settings.context or 1024
    if settings.init_from:
        dtype = None if settings.shard else torch.float32               # None: mapped, not read
        model = load_checkpoint(settings.init_from, "cpu", dtype, **values)
        config = model.config
    else:
        config = sizes[settings.size] if settings.size else config_class.sized(
            settings.layers, settings.width, tokenizer.vocab_size, context)
        config = dataclasses.replace(config, **{
            "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.begin_id,
            "eos_token_id": tokenizer.end_id, "pad_token_id": None, **values})
    check_vocabulary(config, tokenizer)
    if "context" in given and settings.context > (config.context or settings.context):
        raise ValueError(f"--context {settings.context}: the model's is {config.context}")
    settings.context = min(context, config.context or context)
    if len(corpus.train) <= settings.context:
        settings.context = len(corpus.train) - 1
        run.say(f"warning    the training part has only {len(corpus.train)} tokens: sequences are "
                f"{settings.context} long")
    tokens = settings.tokens_per_step or 16384
    sequences = settings.batch_size or max(1, tokens // settings.context)
    if sequences < run.world:
        run.say(f"warning    {sequences} sequences a step are fewer than the processes: "
                f"{run.world} instead")
        sequences = run.world
    settings.tokens_per_step, settings.batch_size = sequences * settings.context, None
    if settings.lr is None:
        settings.lr = (1e-4 if settings.init_from else 6e-4 if settings.size
                       else 5e-3 * math.sqrt(128 / settings.width))
    settings.optimizer = settings.optimizer or ("adamw" if settings.init_from else "muon")
    epoch = len(corpus.train) / settings.tokens_per_step                # in steps
    if settings.epochs:
        settings.steps, settings.epochs = max(1, round(settings.epochs * epoch)), None
    if settings.steps is None and settings.minutes is None:
        settings.minutes = MINUTES
    steps = settings.steps or (60 * settings.minutes * speed / settings.tokens_per_step
                               if speed else None)                      # None: unknown
    if settings.eval_tokens is None:         # ten take 3 %: learning a token takes three times
        settings.eval_tokens = max(4096, int(0.009 * steps * settings.tokens_per_step)
                                   ) if steps else 32768
    if settings.sample_prompt is None:
        settings.sample_prompt = opening(corpus)
    with torch.device("meta"):
        empty = NextTokenLoss(model_class(config).train())
    count = sum(parameter.numel() for parameter in empty.parameters())
    run.say(f"model      {settings.model}, {count:,} parameters: {config}")
    plan_memory(settings, run, empty, sequences, count, count)
    length = f"{settings.minutes:g} minutes" if settings.minutes else f"{settings.steps} steps"
    run.say(f"plan       {length}" + (f", {steps / epoch:.2f} epochs" if steps else "")
            + f"; {settings.tokens_per_step} tokens a step, {settings.micro_batch} sequences of "
            f"{settings.context} at once, learning rate {settings.lr:.2g}"
            + (f", Muon's {settings.muon_lr:.2g}" if settings.optimizer == "muon" else ""))
    if steps and steps / epoch > EPOCHS:
        run.say(f"warning    {steps / epoch:.0f} passes over the text teach little after the first "
                f"{EPOCHS}: more text, fewer steps or a smaller model would do as well")
    return config, model


def opening(corpus: Corpus) -> str:
    """The first words of the held-out text, for samples and for the closing line."""
    ids = corpus.val[:64]
    lines = corpus.tokenizer.decode(ids[ids != corpus.tokenizer.end_id].tolist()).splitlines()
    words = next((line.split() for line in lines if line.strip()), [])
    return " ".join(words[:3])[:30]

# -------------------------------------------------------------------------------------------- main


def train(settings: Settings, given: set[str]) -> None:
    """The script: data, model, loop."""
    saved, again = None, cluster.restarted(settings, given)
    if settings.resume:
        out, saved = load_resume(settings.resume)
        settings, changed = resume_settings(Settings, saved, settings, given, out, HARMLESS)
    else:
        check_settings(settings, given)
    run = start_run(settings, STARTED)
    speed = None if saved else plan_run(settings, run)
    if settings.plan:
        return speed or run.say("plan       nothing was left open: sizes and length are given")
    corpus = prepare_corpus(settings, run, saved_tokenizer(saved) if saved else None)
    if saved and corpus.key != saved["data"]:
        raise ValueError(f"--resume {settings.out}: the data have changed since it was started")
    tokenizer, end = corpus.tokenizer, corpus.tokenizer.end_id
    first = int(corpus.val[0]) if end is None else end      # nanoGPT's characters have no end
    config, model = derive(settings, given, run, corpus, speed)
    torch.manual_seed(settings.seed)
    with torch.device("meta" if run.sharded else "cpu"):
        model = model or model_parts(settings.model)[0](config)
    if settings.checkpoint_activations:
        checkpoint_blocks(model)
    loss = NextTokenLoss(model).train()
    whole = cluster.shard(loss, run) if run.sharded else loss.to(run.device)

    def check(limit: int):
        nats = validate(loss if run.sharded else model, run, corpus.val, settings.context, first,
                        limit)
        return {"val_loss": nats,
                "bits_per_byte": nats / math.log(2) * len(corpus.val) / corpus.val_bytes}

    def show():
        prompt = [first, *tokenizer.encode(settings.sample_prompt)]
        if config.context:                   # room for at least one new token
            prompt = prompt[:config.context - 1]
        [new] = model.generate([prompt], 150, temperature=0.8, top_p=0.9, stop=end,
                               seed=settings.seed)
        run.say(f"--- sample ---\n{tokenizer.decode(prompt[1:] + new)}\n---")
        if run.rank == 0:
            draw_log(run.out)
    rivals = compressed(corpus)
    run.say(f"to beat    gzip -9 {rivals['gzip']:.3f}, xz -9e {rivals['xz']:.3f} bits per byte of "
            "the held-out text")
    if settings.eval_only:
        return run.say("validation " + shown(check(len(corpus.val)) | rivals))

    sequences = settings.tokens_per_step // settings.context
    batches = Batches(corpus.train, settings.context, sequences, settings.micro_batch,
                      settings.seed, run)
    muon = settings.muon_lr / settings.lr if settings.optimizer == "muon" else 0.0
    optimizer, scaler = make_optimizer(model, settings.weight_decay, muon), run.scaler()
    step, best = 0, {"val_loss": math.inf, "step": 0, "done": 0.0}
    if saved:
        step, best = restore(run, saved, changed, model, optimizer, scaler, loss)
    if run.rank == 0:
        run.out = (out if saved else Path(settings.out) if again
                   else make_run_directory(settings.out, settings.model))
        settings.out = str(run.out)
        cluster.mark_run(run.out)
        run.say(f"run        {run.out}")
        write_settings(settings, run.out)
        tokenizer.save(run.out, model_max_length=config.context)
        run.log(step=step, **rivals)
        can_draw()                           # now, because it takes a second or two
    settings.out = cluster.agree(run, settings.out)

    def publish_weights():
        with cluster.gathered(whole, loss, run) as full:
            if run.rank == 0:
                publish(full.model, tokenizer, settings, run.out)

    def save():
        if settings.keep == "last" or best["step"] in (0, step):
            publish_weights()
        with cluster.saving(loss, optimizer, run, Path(settings.out), step) as folder:
            if run.rank == 0:
                tensors = {} if run.sharded else {"model": model.state_dict(),
                                                  "optimizer": optimizer.state_dict()}
                save_resume(folder, settings, run, tokenizer, corpus.key, config, step=step,
                            best=best, scaler=scaler.state_dict(), **tensors)

    step_loss = compile_loss(settings.compile, run, loss, batches(step)[0])
    step_loss = cluster.overlapping(step_loss, run)
    everything = min(len(corpus.val), 30 * settings.eval_tokens)        # or a tenth of the time
    pace = Pace(settings, run, step)
    with Interrupt() as interrupt:
        while pace.done < 1:
            begun = time.perf_counter()
            torch.manual_seed(run.step_seed(settings.seed, step))
            lr = learning_rate(settings, pace.done * pace.steps, pace.steps)
            mean, norm, count = training_step(run, step_loss, optimizer, scaler, batches(step), lr,
                                              settings.clip, settings.tokens_per_step)
            speed = count / (time.perf_counter() - begun)
            step += 1
            pace.after(step)
            pace.report(step, mean, lr, norm, speed)
            if pace.skipped == 10:
                step -= 10
                save()
                raise ValueError("ten steps in a row had no finite loss or gradient: the state "
                                 f"after step {step} is saved; try a lower --lr")
            if pace.due(settings.eval_every, 10, step):
                with pace.closing_takes("validation", 1 + everything / settings.eval_tokens):
                    measures = check(settings.eval_tokens)
                run.log(step=step, **measures)
                run.say("           validation: " + shown(measures))
                if measures["val_loss"] < best["val_loss"]:
                    best = {**measures, "step": step, "done": pace.done}
                    if settings.keep == "best":
                        with pace.closing_takes("saving", 2):
                            publish_weights()
                elif settings.keep == "best":
                    pace.stop_if_no_better(step, best)
            if pace.done < 1 and pace.due(settings.sample_every, 3, step):
                with pace.closing_takes("sample"):
                    show()
            stop = interrupt.seen(run)
            if pace.save_is_due() or stop:
                save()
            if stop:
                run.say(f"stopped after step {step}; to go on:  "
                        f"python train.py --resume {run.out}")
                raise SystemExit(128 + stop)
    save()
    if settings.keep == "best" and best["step"] not in (0, step):
        step = best["step"]
        take_back(loss, run, settings.out)
    show()
    measures = check(everything)
    run.log(step=step, **measures, **rivals)
    finish(settings, run, step, measures | rivals)


def restore(run: Run, saved: dict, changed: list[str], model, optimizer, scaler, loss):
    """Go on where a resume.pt was written: (steps done, the best validation). Says what makes this
    differ in its last bits from a run that was never stopped."""
    if run.sharded:
        cluster.load_shards(loss, optimizer, Path(saved["folder"]))
    else:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    run.started = time.time() - saved["spent"]
    if saved["world"] != run.world:
        changed = [*changed, f"started on {saved['world']} processes"]
    if changed:
        run.say(f"resume     not bit-exactly: {', '.join(changed)}")
    return saved["step"], saved["best"]


def take_back(loss: NextTokenLoss, run: Run, out: str) -> None:
    """Load the best weights, those in the run directory, on all processes."""
    if run.sharded:
        dist.barrier()                       # they are written
        cluster.load_rows(loss, NextTokenLoss(load_checkpoint(out)))
    elif run.rank == 0:
        loss.model.load_state_dict(load_checkpoint(out, "cpu", torch.float32).state_dict())
    if run.world > 1 and not run.sharded:
        for parameter in loss.parameters():
            dist.broadcast(parameter.data, 0)


def finish(settings: Settings, run: Run, step: int, measures: dict) -> None:
    """Say how it ended and what to do with it."""
    if run.rank > 0:
        return
    write_card(run.out)
    losses = measured(run.out, "loss")
    if (run.out / "loss.png").exists():
        run.say(f"the curve is {run.out / 'loss.png'}, as matplotlib drew it")
    elif losses:
        run.say(curve([*losses.values()]) + "\nloss.png is drawn by matplotlib, which is not "
                "installed: python -m pip install matplotlib, then python bench/plot.py "
                f"{run.out}")
    run.say(f"\n{measures['bits_per_byte']:.3f} bits per byte of the held-out text, by the weights "
            f"of step {step}; gzip -9 needs {measures['gzip']:.3f}, xz -9e {measures['xz']:.3f}")
    run.say(f"{clock(time.time() - run.started)} in all, peak memory "
            f"{peak_bytes(run.device) / 2**30:.2f} GB. Talk to it:\n"
            f"python chat.py {run.out} --prompt {shlex.quote(settings.sample_prompt)}")
    if not settings.data:
        run.say("With your own text: python train.py --data FILE-OR-FOLDER ...")


def main(argv: list[str] | None = None) -> None:
    """`python train.py`."""
    argv = sys.argv[1:] if argv is None else argv
    run_script("train.py", train, *parse_settings(Settings, argv, __doc__.split("\n")[0]))


def run_script(name: str, script, settings: Common, given: set[str]) -> None:
    """Run script(settings, given): a user's mistake is one line and exit status 2."""
    show_any_text()
    try:
        script(settings, given)
        if dist.is_initialized():
            dist.barrier()                   # who leaves while another one writes may be aborted
    except (ValueError, OSError) as error:
        sys.exit(complain(f"{name}: {error}"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        settings.micro_batch = settings.micro_batch or 2                # perhaps not decided yet
        sys.exit(complain(f"{name}: out of memory: try {smaller(settings)}"))
    except KeyboardInterrupt:
        sys.exit(complain(f"{name}: stopped before the first step; nothing was lost", 130))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
