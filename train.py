"""Train any model of this project: `python train.py` works on any machine, offline, on real text.

With no argument it reads the source of Python's standard library, trains a tokenizer on it and a
small GPT, shows what it does, and leaves a run directory (out/gpt) that `python chat.py out/gpt`
talks to and transformers opens. Every setting is a flag: see `python train.py --help`.

From the top: settings; process, device, precision; data; loss; the step; memory; what is derived
from the settings; `train`, with the loop. What lies on disk is read and written by checkpoints.py.
To change the data, see `Batches`; the loss, `NextTokenLoss`; the optimiser, `make_optimizer`; the
schedule, `learning_rate`. finetune.py and chat.py import what they need from here.

The recipe is stated in tokens per step: how many sequences go through the model at once, and how
often gradients are accumulated, follows from it, on one process or on many (torchrun). Parameters
are fp32 and computed with under autocast. The order of the data depends on the seed and the step
alone, dropout also on the number of processes: a resumed run gives the same bits.
"""
import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import lzma
import math
import os
import re
import shlex
import signal
import sys
import sysconfig
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import data
import tokenizer as text
from checkpoints import (MODELS, check_vocabulary, config_values, curve, identify, is_out_of_memory,
                         load_checkpoint, load_resume, locate, make_run_directory, measured,
                         model_parts, publish, resume_settings, save_resume, saved_tokenizer,
                         write_settings, write_text)
from data import Parser

STARTED = time.time()

# ---------------------------------------------------------------------------------------- settings


def flag(default, meaning: str, *aliases: str, **limits):
    """A field of the settings: its default, its meaning in --help, other names, and its limits:
    low and high (inclusive), above (exclusive), choices; task, the only one that it belongs to."""
    made = {"default_factory": list} if default == [] else {"default": default}
    return field(metadata={"help": meaning, "aliases": aliases, **limits}, **made)


@dataclass
class Common:
    """Settings of train.py and finetune.py. Each is a flag; None: derived, see `derive`."""
    data: list[str] = flag([], "text files, .jsonl with \"text\", folders or patterns of them, or "
                           "a folder with train.bin and val.bin (without: the source of Python's "
                           "standard library)")
    val: list[str] = flag([], "files to validate on (without: a part of the data is held out)")
    split_seed: int = flag(0, "decides what is held out")
    encoding: str | None = flag(None, "of the text files (UTF-8, or as their first bytes say)")
    tokenizer: str | None = flag(None, "folder, file or name (without: a new one is trained)")
    context: int | None = flag(None, "tokens in a training sequence (256; with --size or "
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
    sample_every: int | None = flag(None, "steps between samples (a quarter)", low=1)
    save_minutes: float = flag(5.0, "minutes between saves", low=0)
    init_from: str | None = flag(None, "start from this checkpoint, with its tokenizer")
    resume: str | None = flag(None, "go on with this run directory, bit-exactly")
    eval_only: bool = flag(False, "validate and stop: nothing is written but the token cache")
    settings: str | None = flag(None, "take settings from this file (a run's settings.json)")


@dataclass
class Settings(Common):
    """Settings of train.py alone."""
    model: str = flag("gpt", "which architecture", choices=MODELS)
    size: str | None = flag(None, "a published size of it, by its name in SIZES")
    layers: int | None = flag(None, "number of blocks (2)", low=1)
    width: int | None = flag(None, "channels of the residual stream (192)", low=1)
    vocab: int = flag(4096, "size of a new vocabulary, specials too", low=257)
    minutes: float | None = flag(None, "instead of --steps: what fits into this time", low=0.05)
    tokens_per_step: int | None = flag(None, "tokens in a step (1024; with --size or --init-from "
                                       "16384)", low=2)
    batch_size: int | None = flag(None, "instead of --tokens-per-step: sequences in a step", low=1)
    eval_tokens: int = flag(32768, "tokens of a validation on the way; the last reads all", low=1)
    sample_prompt: str | None = flag(None, "what samples begin with (the beginning of the held-out "
                                     "text)")
    workers: int | None = flag(None, "processes that pack text (as many as pay)", low=1)


# These do not change the weights, so that a resumed run may have others.
HARMLESS = {"out", "resume", "settings", "workers", "eval_every", "eval_tokens", "sample_every",
            "sample_prompt", "save_minutes"}


def number(kind: type, low=-math.inf, high=math.inf, above=-math.inf):
    """An argparse type: an int or a float within limits."""
    def convert(word: str):
        value = kind(word)
        for wrong, limit in ((not math.isfinite(value), "finite"), (value < low, f"at least {low}"),
                             (value > high, f"at most {high}"),
                             (value <= above, f"more than {above}")):
            if wrong:
                raise argparse.ArgumentTypeError(f"{word} must be {limit}")
        return value
    convert.__name__ = kind.__name__         # argparse says "invalid int value"
    return convert


def add_flag(parser: Parser, spec: dataclasses.Field) -> None:
    """The flag of a field: --name and its aliases."""
    names = ["--" + name.replace("_", "-") for name in (spec.name, *spec.metadata["aliases"])]
    about, kinds = spec.metadata, typing.get_args(spec.type) or (spec.type,)
    limits = {name: about[name] for name in ("low", "high", "above") if name in about}
    shape = {"type": str, "metavar": "TEXT"}
    if spec.type is bool:
        shape = {"action": "store_true"}
    elif typing.get_origin(spec.type) is list:
        shape = {"nargs": "+", "metavar": "TEXT"}
    elif "choices" in about:
        shape = {"choices": about["choices"], "metavar": "|".join(about["choices"])}
    elif kinds[0] in (int, float):
        shape = {"type": number(kinds[0], **limits), "metavar": kinds[0].__name__.upper()}
    left_out = spec.default is None or spec.default is False or spec.default is dataclasses.MISSING
    default = "" if left_out else f" ({spec.default})"
    only = f"{about['task']}: " if "task" in about else ""
    parser.add_argument(*names, dest=spec.name, help=only + about["help"] + default, **shape)


def parse_settings(kind: type, argv: list[str], description: str):
    """The settings of a command line, and the names of those that were given there."""
    parser = Parser(description=description, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for spec in dataclasses.fields(kind):
        add_flag(parser, spec)
    given = vars(parser.parse_args([re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), word)
                                    for word in argv]))
    stated = {}
    if "settings" in given:                  # the file as flags: checked in the same way
        try:
            if not Path(given["settings"]).is_file():
                raise FileNotFoundError(f"--settings {given['settings']}: no such file")
            stated = text.read_json(given["settings"])
        except (ValueError, OSError) as error:
            parser.error(str(error))
        words = []
        for name, value in stated.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            if value not in (None, False, []):
                words += ["--" + name.replace("_", "-"), *map(str, values)]
        stated = vars(parser.parse_args(words))
    return kind(**{**stated, **given}), set(given)

# ------------------------------------------------------------------- process, device and precision


@dataclass
class Run:
    """This process: its device and precision, its place among the others, its run directory."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    started: float = 0.0                     # when the command was given
    out: Path | None = None                  # set on rank 0 once there is a directory
    line: str = ""                           # what a terminal shows until the next line

    def say(self, message: str) -> None:
        """One line of rank 0."""
        if self.rank == 0:
            clear = f"\r{'':{len(self.line)}}\r" if self.line else ""
            print(clear + message, flush=True)
            self.line = ""

    def say_step(self, message: str, step: int, steps: int) -> None:
        """A line about a step: about 200 in all; on a terminal 20, and between them one in place."""
        terminal = sys.stdout.isatty()
        every = max(1, steps // (20 if terminal else 200))
        if step % every == 0 or step in (1, steps):
            self.say(message)
        elif terminal and self.rank == 0:
            print(f"\r{message:{len(self.line)}}", end="", flush=True)
            self.line = message

    def log(self, **event) -> None:
        """One line of log.jsonl."""
        if self.out is not None:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes; on one process the numbers themselves."""
        if self.world == 1:
            return list(numbers)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(numbers, dtype=exact, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def autocast(self):
        """Where the computation takes place in lower precision, if it does."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_device(asked: str | None) -> torch.device:
    """The device asked for, if it works, or the best there is."""
    best = ("cuda" if torch.cuda.is_available()
            else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked or best)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked} does not work here: "
                         + str(error).splitlines()[0][:150]) from None
    return device


def choose_dtype(device: torch.device, asked: str | None) -> tuple[torch.dtype, str]:
    """The precision of the computation, and why. Parameters and optimiser stay in fp32."""
    if asked == "float16" and device.type != "cuda":
        raise ValueError(f"--dtype float16 on {device.type}: the loss scaling it needs is there on "
                         "CUDA only; take bfloat16 or float32")
    if asked:
        return getattr(torch, asked), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes it fast"
        return torch.float16, "this GPU has no fast bfloat16; the loss is scaled"
    if device.type != "cpu":
        return torch.float32, f"the safe choice on {device.type}"
    a, b, best = torch.randn(1024, 512), torch.randn(512, 512), {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y = a.to(dtype), b.to(dtype)
        best[dtype] = min(seconds_of(lambda x=x, y=y: x @ y) for _ in range(8))
    ratio = best[torch.float32] / best[torch.bfloat16]
    if ratio < 1.5:
        return torch.float32, f"bfloat16 is only {ratio:.2f} times as fast on this CPU"
    return torch.bfloat16, f"on this CPU {ratio:.1f} times as fast as float32 in a matrix product"


def seconds_of(work) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def start_run(settings: Common) -> Run:
    """Choose device and precision; join the other processes if torchrun started this one."""
    device = choose_device(settings.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype, reason = choose_dtype(device, settings.dtype)
    run = Run(device, dtype, rank, world, started=STARTED)
    run.say(f"device     {device}: " + ("asked for" if settings.device else "the best there is")
            + (f"; {torch.get_num_threads()} threads" if device.type == "cpu" else "")
            + (f"; {world} processes" if world > 1 else ""))
    run.say(f"precision  {str(dtype).removeprefix('torch.')}: {reason}")
    settings.device, settings.dtype = device.type, str(dtype).removeprefix("torch.")
    return run

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
    """A folder with train.bin and val.bin: ours, or nanoGPT's, which has no tokenizer."""
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

    In pieces, so that no (N, V) logits are kept. penalty, RWKV's L2Wrap: each position's largest
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
    if len(hidden) <= rows or not torch.is_grad_enabled():
        return torch.cat([piece(h, y) for h, y in zip(hidden.split(rows), targets.split(rows))])
    return torch.cat([checkpoint(piece, h, y, use_reentrant=False)
                      for h, y in zip(hidden.split(rows), targets.split(rows))])


@torch.no_grad()
def validate(model, run: Run, ids: np.ndarray, context: int, first: int, limit: int) -> float:
    """Nats a token over evenly spaced blocks of `ids`, `limit` tokens or so; `first` precedes."""
    context = min(context, len(ids))
    starts = np.arange(0, len(ids), context)
    chosen = np.linspace(0, len(starts) - 1, max(1, min(len(starts), -(-limit // context))))
    starts = starts[np.unique(chosen.astype(np.int64))][run.rank::run.world]
    loss, was_training, total, count = NextTokenLoss(model), model.training, 0.0, 0
    model.eval()
    for group in np.array_split(starts, max(1, len(starts) * context // 8192)):
        tokens, targets = np.zeros((2, len(group), context), np.int64)
        targets[:] = -100
        for row, start in enumerate(group):
            block = ids[start:start + context].astype(np.int64)
            tokens[row, 0] = first if start == 0 else ids[start - 1]
            tokens[row, 1:len(block)], targets[row, :len(block)] = block[:-1], block
        if len(group):
            batch = {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
            with run.autocast():
                nats, known = loss(to_device(batch, run.device))
            total, count = total + nats.item(), count + known.item()
    model.train(was_training)
    total, count = run.sum(total, count)
    return total / count


def compressed(corpus: Corpus) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9e need for the held-out text (its first 16 MB)."""
    ids = corpus.val[:8 << 20]
    size = corpus.tokenizer.decode(ids[ids != corpus.tokenizer.end_id].tolist()).encode()[:16 << 20]
    return {"gzip": 8 * len(gzip.compress(size, 9)) / len(size),
            "xz": 8 * len(lzma.compress(size, preset=9 | lzma.PRESET_EXTREME)) / len(size)}

# ---------------------------------------------------------------------------------------- the step


def make_optimizer(model, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the model's own groups and constants; fused where the device has it."""
    groups = [group for group in model.parameter_groups(weight_decay) if group["params"]]
    try:
        return torch.optim.AdamW(groups, lr=0.0, **model.OPTIMIZER, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=0.0, **model.OPTIMIZER)


def learning_rate(settings: Common, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to final_lr of the peak."""
    warmup = steps // 10 if settings.warmup is None else settings.warmup
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))                       # from 1 to 0
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * cosine)


def training_step(run: Run, loss, optimizer, scaler, batches: list[dict], lr: float, clip: float,
                  nominal: float) -> tuple[float, float, float]:
    """One step of the optimiser on the mean over all targets of a step; `batches` are this
    process's micro-batches. Returns (mean loss, norm of the gradient, number of targets).

    Sums are accumulated and divided once, by the number of targets on all processes: unequal
    micro-batches, and any number of processes, give the step of one large batch. Where loss or
    gradient are not finite, no parameter changes. nominal: about that number, so that fp16 holds
    the gradients meanwhile.
    """
    total, count = 0.0, 0
    for batch in batches:
        with run.autocast():
            nats, targets = loss(to_device(batch, run.device))
        scaler.scale(nats / nominal).backward()
        total, count = total + nats.detach(), count + targets
    total, count = run.sum(float(total), float(count))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in parameters:
        if run.world > 1:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        if parameter.grad is not None:
            parameter.grad.mul_(nominal / max(count, 1.0))
    scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip))
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
    if asked == "off" or (asked == "auto" and run.device.type != "cuda"):
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


def count_skipped(run: Run, skipped: int, step: int, mean: float, norm: float) -> int:
    """How many steps in a row were skipped, this one included."""
    if math.isfinite(mean) and math.isfinite(norm):
        return 0
    run.say(f"step {step + 1}: loss {mean:.4g}, gradient norm {norm:.4g}: skipped")
    return skipped + 1


def due(every: int | None, parts: int, step: int, steps: int) -> bool:
    """Whether it is time after so many steps: each `every` steps, or `parts` times in a run."""
    return step % every == 0 if every else step * parts // steps > (step - 1) * parts // steps


class Pace:
    """How many steps the run has, and how long they take.

    With --minutes the number of steps is an estimate, renewed after each step from the pace so far
    and the time that is left since the command was given; warm-up and decay follow it.
    """

    def __init__(self, settings: Settings, run: Run, step: int):
        self.minutes = getattr(settings, "minutes", None)               # finetune.py has none
        self.run, self.first = run, step
        self.steps = settings.steps or step + 1000
        self.begun = self.saved = time.time()
        self.left, self.save_every = 0.0, 60 * settings.save_minutes

    def after(self, step: int) -> None:
        """Look at the clock after a step."""
        now = time.time()
        each = (now - self.begun) / (step - self.first)
        if self.minutes:                     # 5 %: the last validation
            left = self.run.started + 0.95 * 60 * self.minutes - now
            self.steps = step + int(max(0.0, self.run.sum(left / each)[0] / self.run.world))
        self.left = each * (self.steps - step)

    def save_is_due(self) -> bool:
        """Whether rank 0 has not saved for --save-minutes."""
        overdue = self.run.rank == 0 and time.time() - self.saved >= self.save_every
        if not self.run.sum(float(overdue))[0]:
            return False
        self.saved = time.time()
        return True


class Interrupt:
    """Ctrl-C and SIGTERM as a flag that the loop looks at between two steps."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):                       # not the main thread
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        signal.signal(number, self.before[number])                      # a second one ends at once

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def seen(self, run: Run) -> int:
        """The signal that any process was sent, or 0."""
        return int(max(run.sum(self.signal)))

# ------------------------------------------------------------------------------------------ memory


def activation_bytes(model_class, config, context: int) -> int:
    """Bytes that a sequence keeps in fp32 for the backward pass, counted on the meta device."""
    with torch.device("meta"):
        model = model_class(config).train()
        tokens = torch.zeros((1, context), dtype=torch.int64)
    own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage      # held, so that no other gets its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        NextTokenLoss(model)({"tokens": tokens, "targets": tokens})
    return sum(storage.nbytes() for storage in kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that this device has left; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    names = getattr(os, "sysconf_names", {})
    pages = next((n for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if n in names), None)
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages else None


def plan_memory(settings: Common, run: Run, model_class, config, sequences: int, held: int,
                learn: int) -> None:
    """Say what training needs beside what there is, and set how many sequences go at once.

    held: parameters in memory; learn: those of them with a gradient and Adam's two moments.
    """
    each = activation_bytes(model_class, config, settings.context)
    each = int(each * (0.6 if run.dtype != torch.float32 else 1.0))     # half of most, not of all
    if settings.checkpoint_activations:
        each //= 4
    free, fixed, most = free_bytes(run.device), 4 * held + 12 * learn, -(-sequences // run.world)
    if settings.micro_batch is None:
        room = (0.7 * free - fixed) / each if free else 8
        most = max(1, min(most, 16384 // settings.context, int(room)))
        settings.micro_batch = 1 << (most.bit_length() - 1)             # a power of two
    need, gb = fixed + each * settings.micro_batch, 1 << 30
    run.say(f"memory     about {need / gb:.2f} GB: parameters {4 * held / gb:.2f}, gradients "
            f"{4 * learn / gb:.2f}, Adam {8 * learn / gb:.2f}, activations "
            f"{each * settings.micro_batch / gb:.2f}"
            + (f"; {free / gb:.1f} GB are free" if free else ""))
    if free and need > free:
        run.say(f"warning    that is more than there is: try {smaller(settings)}")


def smaller(settings: Common) -> str:
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


def shown(measures: dict[str, float]) -> str:
    """Measures on one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items())


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

# ----------------------------------------------------------------------- what the settings lead to


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
    if settings.init_from:
        found = identify(locate(settings.init_from))
        if "model" in given and settings.model != found:
            raise ValueError(f"--model {settings.model}: {settings.init_from} is {found}")
        settings.model = found


def derive(settings: Settings, given: set[str], run: Run, corpus: Corpus):
    """Fill in every setting that was left open, say what was decided; (config, model or None).

    Only --init-from has a model, with its weights, already.
    """
    model_class, config_class, sizes = model_parts(settings.model)
    tokenizer, model = corpus.tokenizer, None
    values = config_values(config_class, settings.config)
    own = not (settings.init_from or settings.size)                     # a size of our own
    context = settings.context or (256 if own else 1024)
    if own:
        settings.layers, settings.width = settings.layers or 2, settings.width or 192
    if settings.init_from:
        model = load_checkpoint(settings.init_from, "cpu", torch.float32, **values)
        config = model.config
    else:
        if settings.size and settings.size not in sizes:
            raise ValueError(f"--size {settings.size}: {settings.model} has {', '.join(sizes)}")
        config = sizes[settings.size] if settings.size else config_class.sized(
            settings.layers, settings.width, tokenizer.vocab_size, context)
        config = dataclasses.replace(config, **{
            "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.end_id, "pad_token_id": None, **values})
    check_vocabulary(config, tokenizer)
    if "context" in given and settings.context > (config.context or settings.context):
        raise ValueError(f"--context {settings.context}: the model's is {config.context}")
    settings.context = min(context, config.context or context)
    if len(corpus.train) <= settings.context:
        settings.context = len(corpus.train) - 1
        run.say(f"warning    the training part has only {len(corpus.train)} tokens: sequences are "
                f"{settings.context} long")
    tokens = settings.tokens_per_step or (1024 if own else 16384)
    sequences = settings.batch_size or max(1, tokens // settings.context)
    if sequences < run.world:
        run.say(f"warning    {sequences} sequences a step are fewer than the processes: "
                f"{run.world} instead")
        sequences = run.world
    settings.tokens_per_step, settings.batch_size = sequences * settings.context, None
    if settings.lr is None:
        settings.lr = 3.5e-3 * math.sqrt(192 / settings.width) if own else 6e-4
        settings.lr = 1e-4 if settings.init_from else settings.lr
    epoch = len(corpus.train) / settings.tokens_per_step                # in steps
    if settings.epochs:
        settings.steps, settings.epochs = max(1, round(settings.epochs * epoch)), None
    if settings.steps is None and settings.minutes is None:
        settings.steps = 1800
    if settings.sample_prompt is None:
        settings.sample_prompt = opening(corpus)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    run.say(f"model      {settings.model}, {count:,} parameters: {config}")
    plan_memory(settings, run, model_class, config, sequences, count, count)
    length = (f"{settings.minutes:g} minutes" if settings.minutes else
              f"{settings.steps} steps, {settings.steps / epoch:.2f} epochs")
    run.say(f"plan       {length}; {settings.tokens_per_step} tokens a step, "
            f"{settings.micro_batch} sequences of {settings.context} at once, "
            f"learning rate {settings.lr:.2g}")
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
    saved = None
    if settings.resume:
        out, saved = load_resume(settings.resume)
        settings = resume_settings(Settings, saved, settings, given, out, HARMLESS)
    else:
        check_settings(settings, given)
    run = start_run(settings)
    corpus = prepare_corpus(settings, run, saved_tokenizer(saved) if saved else None)
    if saved and corpus.key != saved["data"]:
        raise ValueError(f"--resume {settings.out}: the data have changed since it was started")
    tokenizer, end = corpus.tokenizer, corpus.tokenizer.end_id
    config, model = derive(settings, given, run, corpus)
    torch.manual_seed(settings.seed)
    model = (model or model_parts(settings.model)[0](config)).to(run.device).train()
    if settings.checkpoint_activations:
        checkpoint_blocks(model)

    def check(last):
        nats = validate(model, run, corpus.val, settings.context, end,
                        len(corpus.val) if last else settings.eval_tokens)
        bits = nats / math.log(2) * len(corpus.val) / corpus.val_bytes
        return {"val_loss": nats, "bits_per_byte": bits} | (rivals if last else {})

    def sample():
        prompt = [end, *tokenizer.encode(settings.sample_prompt)]
        if config.context:                   # room for at least one new token
            prompt = prompt[:config.context - 1]
        [new] = model.generate([prompt], 150, temperature=0.8, top_p=0.9, stop=[end],
                               seed=settings.seed)
        run.say(f"--- sample ---\n{tokenizer.decode(prompt[1:] + new)}\n---")
    rivals = compressed(corpus)
    run.say(f"to beat    gzip -9 {rivals['gzip']:.3f}, xz -9e {rivals['xz']:.3f} bits per byte of "
            "the held-out text")
    if settings.eval_only:
        return run.say("validation " + shown(check(True)))

    sequences = settings.tokens_per_step // settings.context
    batches = Batches(corpus.train, settings.context, sequences, settings.micro_batch,
                      settings.seed, run)
    optimizer = make_optimizer(model, settings.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    step, skipped, measures = 0, 0, {}
    if saved:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        step, run.started = saved["step"], time.time() - saved["spent"]
        if saved["world"] != run.world:
            run.say(f"resume     not bit-exactly: started on {saved['world']} processes")
    if run.rank == 0:
        run.out = out if saved else make_run_directory(settings.out, settings.model)
        settings.out = str(run.out)
        run.say(f"run        {run.out}")
        write_settings(settings, run.out)
        tokenizer.save(run.out, model_max_length=config.context)

    def save():
        if run.rank == 0:
            save_resume(run.out, settings, run, tokenizer, corpus.key, config, step=step,
                        model=model.state_dict(), optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict())
            publish(model, tokenizer, settings, run.out)

    loss = compile_loss(settings.compile, run, NextTokenLoss(model), batches(step)[0])
    pace = Pace(settings, run, step)
    with Interrupt() as interrupt:
        while step < pace.steps:
            begun = time.perf_counter()
            torch.manual_seed((settings.seed * 1_000_003 + step) * run.world + run.rank)
            lr = learning_rate(settings, step, pace.steps)
            mean, norm, count = training_step(run, loss, optimizer, scaler, batches(step), lr,
                                              settings.clip, settings.tokens_per_step)
            speed = count / (time.perf_counter() - begun)
            skipped = count_skipped(run, skipped, step, mean, norm)
            step += 1
            pace.after(step)
            run.say_step(f"step {step}/{pace.steps}  loss {mean:.4f}  lr {lr:.2e}  norm {norm:.2f}"
                         f"  {speed:,.0f} tokens/s  {clock(pace.left)} left", step, pace.steps)
            run.log(step=step, loss=mean, lr=lr, norm=norm, tokens_per_s=speed, skipped=skipped,
                    seconds=time.time() - run.started, peak_bytes=peak_bytes(run.device))
            if skipped == 10:
                step -= 10
                save()
                raise ValueError("ten steps in a row had no finite loss or gradient: the state "
                                 f"after step {step} is saved; try a lower --lr")
            last = step >= pace.steps
            if last or due(settings.eval_every, 10, step, pace.steps):
                measures = check(last)
                run.log(step=step, **measures)
                run.say("           validation: " + shown(measures))
            if last or due(settings.sample_every, 4, step, pace.steps):
                sample()
            stop = interrupt.seen(run)
            if pace.save_is_due() or last or stop:
                save()
            if stop:
                run.say(f"stopped after step {step}; to go on:  "
                        f"python train.py --resume {run.out}")
                raise SystemExit(128 + stop)
    if not measures:                         # all was done, but perhaps not published
        measures = check(True)
        save()
    if run.rank == 0:
        finish(settings, run, measures)


def finish(settings: Settings, run: Run, measures: dict) -> None:
    """Say how it ended and what to do with it."""
    losses = measured(run.out, "loss")
    if losses and not (run.out / "loss.png").exists():
        run.say(curve([*losses.values()]))
    run.say(f"\n{measures['bits_per_byte']:.3f} bits per byte of the held-out text; gzip -9 needs "
            f"{measures['gzip']:.3f}, xz -9e {measures['xz']:.3f}")
    run.say(f"{clock(time.time() - run.started)} in all, peak memory "
            f"{peak_bytes(run.device) / 2**30:.2f} GB. Talk to it:\n"
            f"python chat.py {run.out} --prompt {shlex.quote(settings.sample_prompt)}")


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


def show_any_text() -> None:
    """A terminal or file that cannot hold a letter gets a ? instead."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def complain(line: str, status: int = 2) -> int:
    """Print one line on stderr; the exit status."""
    print(line, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
