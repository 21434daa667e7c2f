"""Train any model of this project: `python train.py` works on any machine, offline, on real text.

With no argument it reads the source of Python's standard library, trains a tokenizer on it and a
small GPT, shows what it does, and leaves a run directory (out/gpt) that `python chat.py out/gpt`
talks to and transformers opens. Every setting is a flag: see `python train.py --help`.

From the top: settings; models; this process; data; loss; memory; the loop, `fit`; the run
directory; `main`. finetune.py and chat.py import what they need from here.

The recipe is stated in tokens per step: the script derives how many sequences go through the model
at once and how often gradients are accumulated, on one process or on many (torchrun). Parameters
are fp32 and computed with under autocast. Everything random is drawn from the seed and the number
of the step alone, so a resumed run gives the same bits.
"""
import argparse
import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import importlib
import json
import lzma
import math
import os
import pickle
import re
import signal
import statistics
import struct
import sys
import sysconfig
import tempfile
import time
import typing
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokenizer as text

STARTED = time.time()

# ---------------------------------------------------------------------------------------- settings


def flag(default, meaning: str, **limits):
    """A field of the settings: its default, its line in --help, and the values it can have."""
    made = {"default_factory": list} if default == [] else {"default": default}
    return field(metadata={"help": meaning, **limits}, **made)


@dataclass
class Settings:
    """What is asked. Each field is a flag; None: the script decides, and says what and why."""
    model: str = flag("gpt", "which architecture", choices="models")
    size: str | None = flag(None, "a published size of it, by its name in SIZES")
    layers: int | None = flag(None, "number of blocks (default: 2)", low=1)
    width: int | None = flag(None, "channels of the residual stream (default: 192)", low=1)
    context: int | None = flag(None, "tokens in a training sequence (default: 256; with --size or "
                                     "--init-from the model's, 1024 at most)", low=2)
    config: list[str] = flag([], "config fields as field=value, for what has no flag of its own")
    data: list[str] = flag([], "text files, .jsonl with \"text\", folders or patterns of them, "
                               "or a folder with train.bin and val.bin (default: the source of "
                               "Python's standard library)")
    tokenizer: str | None = flag(None, "folder, file or name of one (default: train a new one)")
    vocab: int | None = flag(None, "ids of a new tokenizer, specials too (default: 4096)", low=257)
    split_seed: int = flag(0, "decides which documents are held out")
    out: str | None = flag(None, "the run directory (default: out/MODEL, then out/MODEL-2, ...)")
    steps: int | None = flag(None, "optimiser steps (default: 1800)", low=1)
    minutes: float | None = flag(None, "instead of --steps: what fits into this time", low=0.05)
    tokens_per_step: int | None = flag(None, "tokens in a step (default: 1024; with --size or "
                                             "--init-from 16384)", low=2)
    micro_batch: int | None = flag(None, "sequences at once (default: what fits)", low=1)
    lr: float | None = flag(None, "peak learning rate (default: 0.0035 * sqrt(192 / width); with "
                                  "--size 0.0006, with --init-from 0.0001)", above=0)
    final_lr: float = flag(0.05, "learning rate at the end, as a part of the peak", low=0, high=1)
    warmup: int | None = flag(None, "steps of linear warm-up (default: a tenth of all)", low=0)
    weight_decay: float = flag(0.1, "decay of the matrices", low=0)
    clip: float = flag(1.0, "largest norm of the gradient", above=0)
    seed: int = flag(0, "decides initial weights, order of the data, dropout, samples", low=0)
    device: str | None = flag(None, "cuda, mps or cpu (default: the first of them there is)")
    dtype: str | None = flag(None, "precision of the computation (default: as fast as is safe)",
                             choices=("float32", "bfloat16", "float16"))
    compile: str = flag("auto", "compile the step: auto does on CUDA",
                        choices=("auto", "on", "off"))
    checkpoint_activations: bool = flag(False, "save memory: compute blocks again when going back")
    eval_every: int | None = flag(None, "steps between validations (default: a tenth)", low=1)
    eval_tokens: int = flag(32768, "tokens of a validation on the way; the last reads all", low=1)
    sample_every: int | None = flag(None, "steps between samples (default: a quarter)", low=1)
    sample_prompt: str | None = flag(None, "what samples begin with (default: nothing; \"def\" on "
                                           "the source of Python's standard library)")
    save_minutes: float = flag(5.0, "minutes between saves", low=0)
    workers: int | None = flag(None, "processes that pack text (default: as many as pay)", low=1)
    init_from: str | None = flag(None, "start from this checkpoint, with its tokenizer")
    resume: str | None = flag(None, "go on with this run directory, to the same bits")
    eval_only: bool = flag(False, "validate and stop: nothing is written but the token cache")
    settings: str | None = flag(None, "take settings from this file (a run's settings.json)")


HARMLESS = {"out", "resume", "settings", "workers", "eval_every", "eval_tokens", "sample_every",
            "sample_prompt", "save_minutes"}           # these do not change the weights


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, which name the nearest flag."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.5)
            message = f"unknown flag {unknown[1]}" + (f": did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def value_type(spec: dataclasses.Field) -> type:
    """int, float, str, bool or list: what the field holds if it is not None."""
    if typing.get_origin(spec.type) is list:
        return list
    return next(kind for kind in (*typing.get_args(spec.type), spec.type) if kind is not type(None))


def convert(spec: dataclasses.Field, value):
    """A value from a flag or a file as the field's type; ValueError if it is impossible."""
    name, kind, limits = "--" + spec.name.replace("_", "-"), value_type(spec), spec.metadata
    if value is None and spec.default is None:
        return None
    try:
        if kind in (bool, list) and not isinstance(value, kind):
            raise ValueError
        value = kind(value)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (ValueError, TypeError):
        raise ValueError(f"{name} takes {kind.__name__}, not {value!r}") from None
    choices = tuple(MODELS) if limits.get("choices") == "models" else limits.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}: choose from {', '.join(choices)}")
    for bound, words, wrong in (("low", "at least", lambda limit: value < limit),
                                ("high", "at most", lambda limit: value > limit),
                                ("above", "more than", lambda limit: value <= limit)):
        if bound in limits and wrong(limits[bound]):
            raise ValueError(f"{name} is {value}: it must be {words} {limits[bound]}")
    return value


def parse_settings(kind: type, argv: list[str], description: str) -> tuple[Settings, set[str]]:
    """The settings of a command line, and the names of those that were given there."""
    parser = Parser(description=description, allow_abbrev=False)
    specs = {spec.name: spec for spec in dataclasses.fields(kind)}
    defaults = {name: [] if value_type(spec) is list else spec.default
                for name, spec in specs.items()}
    for name, spec in specs.items():
        holds, choices = value_type(spec), spec.metadata.get("choices")
        shape = {"action": "store_true"} if holds is bool else {"metavar": holds.__name__.upper()}
        if holds is list:
            shape["nargs"] = "+"
        if isinstance(choices, tuple):
            shape["metavar"] = "|".join(choices)
        shown = "" if defaults[name] in (None, False, "", []) else f" (default: {defaults[name]})"
        shape["help"] = spec.metadata["help"] + shown
        parser.add_argument("--" + name.replace("_", "-"), **shape)
    argv = [re.sub(r"^--[\w-]+", lambda match: match[0].replace("_", "-"), word) for word in argv]
    parsed = vars(parser.parse_args(argv))
    given = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
    given &= set(specs)
    try:
        stated = read_json(parsed["settings"]) if parsed["settings"] else {}
        if set(stated) - set(specs):
            raise ValueError(f"{parsed['settings']} has unknown settings: "
                             + ", ".join(sorted(set(stated) - set(specs))))
        values = {**defaults, **stated, **{name: parsed[name] for name in given}}
        return kind(**{name: convert(specs[name], value) for name, value in values.items()}), given
    except (ValueError, OSError) as error:
        parser.error(str(error))

# ------------------------------------------------------------------------------------------ models


MODELS = {"gpt": ("gpt", "GPT"), "llama3": ("llama3", "Llama3"), "glm4": ("glm4", "GLM4"),
          "rwkv6": ("rwkv6", "RWKV6"),
          **{f"rwkv{n}": (f"lineage.rwkv{n}", f"RWKV{n}") for n in (2, 3, 4, 5)}}
MODEL_TYPES = {"gpt2": "gpt", "llama": "llama3", "chatglm": "glm4", "glm": "glm4", "glm4": "glm4",
               **{f"rwkv{n}": f"rwkv{n}" for n in (2, 3, 4, 5, 6)}}      # of config.json -> ours


def model_parts(name: str):
    """(class, config class, SIZES) of a model by its name in MODELS."""
    module, class_name = MODELS[name]
    module = importlib.import_module(module)
    return getattr(module, class_name), getattr(module, class_name + "Config"), module.SIZES


RWKVS = (                                    # the first whose pattern a name and a shape match
    (r"att\.(k_k|x_r) ", "an RWKV-7"),
    (r"att\.time_maa_rkvw_w1 ", "a variant of RWKV-6, x060b or x060c"),
    (r"att\.gate_w1 ", "a variant of RWKV-6, x060a"),
    (r"\.ffnPre\.", "an RWKV whose first block has ffnPre"),
    (r"\.tiny_|att\.qq\.", "an RWKV with attention beside its time mixing (tiny_ or att.qq)"),
    (r"\.pos_emb_", "an RWKV for images, with pos_emb"),
    (r"\.attention\.time_", "an RWKV in the Hugging Face layout"),
    (r"att\.time_maa_x ", "rwkv6"),
    (r"att\.ln_x\.weight ", "rwkv5"),
    (r"att\.time_mix \(", "rwkv2"),
    (r"att\.time_decay \(\d+, 1\)", "rwkv3"),
    (r"att\.time_decay ", "rwkv4"),
)


def identify_rwkv(path: Path) -> str:
    """Which RWKV a .pth holds, or the one in a folder: names and shapes of its tensors tell."""
    files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
    if len(files) > 1:
        raise ValueError(f"{path} holds several models, {', '.join(file.name for file in files)}: "
                         "give the path of one")
    if not files:
        raise FileNotFoundError(f"{path} has no config.json that names a model of ours, nor a .pth")
    tensors = read_pickle(files[0])
    lines = [f"{name} {tuple(getattr(tensor, 'shape', ()))}" for name, tensor in tensors.items()]
    found = next((what for pattern, what in RWKVS
                  if any(re.search(pattern, line) for line in lines)),
                 f"no RWKV, no model of ours: it holds {', '.join(lines[:3])}")
    if found not in ("rwkv2", "rwkv3") and "head_q.weight" in tensors:
        found = "an RWKV with headQK, which is known of RWKV-2 and RWKV-3 only"
    if found not in MODELS:
        raise ValueError(f"{path} is {found}; RWKV-2 to RWKV-6 are supported")
    return found


def identify(path: Path) -> str:
    """Which of our models a checkpoint is: its config tells, or the names of its tensors."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ValueError(f"{path} is an adapter: python finetune.py --merge --init-from {path} "
                         "--out NEW makes a checkpoint of it")
    folder = path if path.is_dir() else path.parent
    if path.suffix == ".pt" or (path / "ckpt.pt").exists():
        return "gpt"
    meta = (folder / "params.json").exists() or any(folder.glob("consolidated.*.pth"))
    if meta and not (folder / "config.json").exists():
        return "llama3"
    stated = None
    if (folder / "config.json").exists() and path.suffix != ".pth":
        stated = read_json(folder / "config.json").get("model_type")
        if stated not in MODEL_TYPES:
            raise ValueError(f"{folder}/config.json is of model_type {stated!r}, none of "
                             + ", ".join(MODEL_TYPES))
        if not stated.startswith("rwkv"):
            return MODEL_TYPES[stated]
    found = identify_rwkv(path)
    if stated not in (None, found):
        raise ValueError(f"{path} is {found}, but its config.json has model_type {stated!r}")
    return found


def locate(path: str | Path) -> Path:
    """A folder or file as it is; a repository's id, as openai-community/gpt2: where it lies."""
    path = Path(path)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()):
        with contextlib.suppress(ImportError):          # without the package it is a missing folder
            from huggingface_hub import snapshot_download
            return Path(snapshot_download(path.as_posix()))
    return path


def load_checkpoint(path: str | Path, device: str = "cpu", dtype=None, **overrides):
    """The model in a checkpoint, whichever of ours it is: a folder, a file or a repository's id.

    overrides: config fields that the file states wrongly. Whatever is wrong with the checkpoint is
    a ValueError or OSError of one line; running out of memory passes.
    """
    path = locate(path)
    with readable(path):
        name = identify(path)
    with readable(path, re.sub(r"(RWKV)", r"\1-", MODELS[name][1])):
        model_class, config_class, _ = model_parts(name)
        folder = path if path.is_dir() else path.parent
        if (folder / "config.json").exists():
            check_fields(config_class, read_json(folder / "config.json"), folder / "config.json")
        unknown = set(overrides) - {spec.name for spec in dataclasses.fields(config_class)}
        if unknown:
            raise ValueError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}")
        check_fields(config_class, overrides, config_class.__name__)
        return model_class.from_pretrained(path, device, dtype, **overrides)


@contextlib.contextmanager
def readable(path: Path, kind: str = ""):
    """Turns what reading a damaged or foreign file raises into one line; the cause is chained.

    It translates the exceptions that torch.load, safetensors, json and our loaders are known to
    raise for such files, and no others: a fault of ours should not read as a damaged file.
    """
    damage = [OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
              ArithmeticError, AssertionError, pickle.UnpicklingError, struct.error,
              zipfile.BadZipFile]
    with contextlib.suppress(ImportError):
        from safetensors import SafetensorError
        damage.append(SafetensorError)
    try:
        yield
    except tuple(damage) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = re.sub(r"\x1b\[[\d;]*m", "", " ".join(str(error).split()))[:300]
        pointers = [file for file in ([path] if path.is_file() else sorted(path.glob("*.*")))
                    if is_pointer(file)]
        if pointers:
            reason = f"{pointers[0]} is a pointer to the weights: run `git lfs pull` to get them"
        elif isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        elif "loading state_dict" in reason:
            reason = f"{path} does not fit its config: {reason}"
        elif type(error) is KeyError:
            reason = f"{path}{kind and f', taken for {kind},'} lacks {reason}"
        elif isinstance(error, (TypeError, AttributeError, ArithmeticError)):
            reason = f"{path} states what does not fit ({type(error).__name__}: {reason})"
        elif type(error) not in (ValueError, FileNotFoundError):
            reason = f"{path} is damaged, or no file of tensors ({type(error).__name__}: {reason})"
        elif str(path) not in reason:
            reason = f"{path}: {reason}"
        raise (type(error) if type(error) is FileNotFoundError else ValueError)(reason) from error


def is_pointer(path: Path) -> bool:
    """Whether git-lfs left a pointer where the file should be."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9) == b"version h"


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError or OSError of one line."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_pickle(path: Path) -> dict:
    """The dict in a file of torch.save, mapped into memory; nothing in it is executed."""
    with readable(path):
        content = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))             # no zip before torch 1.6
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
        return content


def check_fields(config_class: type, values: dict, where) -> None:
    """ValueError that names the first value which its config field cannot hold; None may be."""
    types = typing.get_type_hints(config_class)
    for name, value in values.items():
        kinds = typing.get_args(types.get(name)) or (types.get(name),)
        kinds = {typing.get_origin(kind) or kind for kind in kinds}     # list[int]: list
        fits = type(value) in kinds or (float in kinds and type(value) is int)
        if name in types and value is not None and not fits:
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise ValueError(f"{where}: {name} is {value!r}, but it takes {wanted}")


def eos_tokens(config) -> list[int]:
    """The config's eos_token_id, which may be an int, a list or None, as a list."""
    stated = config.eos_token_id
    return stated if isinstance(stated, list) else [] if stated is None else [stated]


def config_values(config_class: type, assignments: list[str]) -> dict:
    """--config field=value ...: each value is read as JSON where it is some, else as text."""
    known, values = {spec.name for spec in dataclasses.fields(config_class)}, {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--config takes field=value, not {assignment!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"--config {assignment}: {config_class.__name__} has no field {name}"
                             + (f", but {near[0]}" if near else ""))
        try:
            value = json.loads(value)
        except ValueError:
            pass
        values[name] = value
    check_fields(config_class, values, "--config")
    return values


def open_model(settings: Settings, tokenizer):
    """(class, config, model or None): what to train. Only --init-from has weights already."""
    model_class, config_class, sizes = model_parts(settings.model)
    values, model = config_values(config_class, settings.config), None
    if settings.init_from:
        model = load_checkpoint(settings.init_from, "cpu", torch.float32, **values)
        config = model.config
    else:
        if settings.size and settings.size not in sizes:
            raise ValueError(f"--size {settings.size}: {settings.model} has {', '.join(sizes)}")
        config = sizes[settings.size] if settings.size else config_class.sized(
            settings.layers, settings.width, tokenizer.vocab_size, settings.context)
        config = dataclasses.replace(config, **{
            "vocab_size": tokenizer.vocab_size, "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.end_id, "pad_token_id": None, **values})
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"the model has {config.vocab_size} ids, the tokenizer "
                         f"{tokenizer.vocab_size}: it needs its own tokenizer")
    return model_class, config, model

# ------------------------------------------------------------------------------------ this process


@dataclass
class Run:
    """Where and as what this process runs; only rank 0 prints and writes."""
    device: torch.device
    dtype: torch.dtype                       # of the computation: parameters are fp32
    rank: int = 0
    world: int = 1
    out: Path | None = None                  # the run directory, on rank 0

    def say(self, *words) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(*words, flush=True)

    def log(self, **event) -> None:
        """One line of log.jsonl."""
        if self.out is not None:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def sum(self, *numbers: float) -> list[float]:
        """Each number added up over all processes."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def autocast(self):
        """The context in which the model computes."""
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


def start_run(settings: Settings) -> Run:
    """Choose device and precision; join the other processes if torchrun started this one."""
    device = choose_device(settings.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype, reason = choose_dtype(device, settings.dtype)
    run = Run(device, dtype, rank, world)
    run.say(f"device     {device}: " + ("asked for" if settings.device else "the best there is")
            + (f"; {torch.get_num_threads()} threads" if device.type == "cpu" else "")
            + (f"; {world} processes" if world > 1 else ""))
    run.say(f"precision  {str(dtype).removeprefix('torch.')}: {reason}")
    settings.device, settings.dtype = device.type, str(dtype).removeprefix("torch.")
    return run


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
        best[dtype] = min(timed(lambda x=x, y=y: x @ y) for _ in range(8))
    ratio = best[torch.float32] / best[torch.bfloat16]
    if ratio < 1.5:
        return torch.float32, f"bfloat16 is only {ratio:.1f} times as fast on this CPU"
    return torch.bfloat16, f"on this CPU {ratio:.1f} times as fast as float32 in a matrix product"


def timed(work) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

# -------------------------------------------------------------------------------------------- data


def standard_library() -> list[tuple[str, Path]]:
    """(name, path) of the source of Python's standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data", "idlelib",
            "lib2to3", "__pycache__"}
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    return sorted((name, path) for name, path in files if not skip & set(name.split("/")[:-1]))


def digest(files: list[tuple[str, Path]], *more: str) -> str:
    """A name for these inputs: of names and contents (of files over 256 MB: size and time)."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, path in files:
        stat = path.stat()
        content = (str(stat.st_mtime_ns).encode() if stat.st_size > 1 << 28
                   else hashlib.blake2b(path.read_bytes()).digest())
        hashed.update(f"{name} {stat.st_size} ".encode() + content)
    hashed.update("\0".join(more).encode())
    return hashed.hexdigest()


@dataclass
class Corpus:
    """Token files and the tokenizer that made them."""
    tokenizer: text.Tokenizer
    train: np.ndarray                        # token ids, mapped from the file
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
    ready = [Path(path) for path in settings.data if (Path(path) / "train.bin").exists()]
    if ready:
        corpus = read_token_folder(ready[0], tokenizer)
        what = str(ready[0])
    else:
        files = text.find_files(settings.data) if settings.data else standard_library()
        known = f"bpe {settings.vocab}" if not place else json.dumps(
            {name: hashlib.blake2b(data).hexdigest() for name, data in tokenizer.files().items()})
        key = digest(files, known, str(settings.split_seed))
        folder = Path(settings.out or "out/x").parent / "data" / key
        if not (folder / "done.json").exists():
            pack_corpus(files, tokenizer, folder, settings, run)
        corpus = read_token_folder(folder, tokenizer)
        corpus.key = key
        what = ", ".join(settings.data) or "the source of Python's standard library"
        size = sum(path.stat().st_size for _, path in files)
        what += f": {len(files)} files, {size / 1e6:.1f} MB"
    if run.rank == 0 and run.world > 1:
        dist.barrier()
    for split, ids in (("train on", corpus.train), ("validate on", corpus.val)):
        if len(ids) < 2:
            raise ValueError(f"{what}: {len(ids)} tokens to {split}: give more text")
    run.say(f"data       {what}")
    run.say(f"tokens     {len(corpus.train):,} to train on, {len(corpus.val):,} held out "
            f"({corpus.val_bytes / len(corpus.val):.2f} bytes each); "
            f"vocabulary of {corpus.tokenizer.vocab_size}")
    return corpus


def pack_corpus(files, tokenizer, folder: Path, settings: Settings, run: Run) -> None:
    """Fill a folder of the cache: tokenizer, train.bin, val.bin; done.json comes last."""
    if tokenizer is None:
        run.say(f"tokenizer  training one of {settings.vocab} ids")
        seen, most = 0, 1 << 26              # 64 MB of text are plenty for a vocabulary

        def texts():
            nonlocal seen
            for split, piece, *_ in text.split_documents(files, settings.split_seed):
                if split == "train" and seen < most:
                    seen += len(piece)
                    yield piece
        tokenizer = text.train_bpe(texts(), settings.vocab - 1, progress=sys.stderr.isatty())
    stats = text.pack(files, tokenizer, folder, settings.split_seed, settings.workers,
                      progress=sys.stderr.isatty())
    tokenizer.save(folder)
    invalid = sum(split["invalid"] for split in stats.values())
    if invalid:
        run.say(f"data       {invalid} invalid UTF-8 sequences became U+FFFD")
    write_text(folder / "done.json", json.dumps(stats) + "\n")


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
        splits.append(text.open_tokens(path, tokenizer.vocab_size, headerless=not ours))
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
            tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))
            made.append({"tokens": tokens, "targets": targets})
        return made

# -------------------------------------------------------------------------------------------- loss


def next_token_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropies (nats, fp32) and the number of targets; -100 is no target."""
    return cross_entropy(model, model.hidden(batch["tokens"]), batch["targets"])


def cross_entropy(model, hidden: torch.Tensor, targets: torch.Tensor):
    """The same from (B, T, C) hidden vectors: in pieces, so that no (B, T, V) logits are kept."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()           # (N, C), (N,)
    rows = max(1, (1 << 26) // model.config.vocab_size)                 # logits of 256 MB in fp32
    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(rows), targets.split(rows)):
        if len(hidden) > rows and torch.is_grad_enabled():
            total = total + checkpoint(piece_loss, model, h, y, use_reentrant=False)
        else:
            total = total + piece_loss(model, h, y)
    return total, (targets != -100).sum()


def piece_loss(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of (n, C) hidden vectors, with the model's L2Wrap in training.

    L2Wrap (RWKV): each position's largest logit m is pulled to 0 by the gradient of w * m^2 / 2;
    the value of the loss does not change.
    """
    logits = model.logits(hidden[None])[0].float()                      # (n, V)
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    penalty = getattr(model, "L2WRAP", 0.0)
    if penalty and model.training:
        pull = 0.5 * penalty * (logits.amax(-1).square() * (targets != -100)).sum()
        loss = loss + pull - pull.detach()
    return loss


@torch.no_grad()
def validate(model, run: Run, ids: np.ndarray, context: int, first: int, limit: int) -> float:
    """Nats a token over evenly spaced blocks of `ids`, `limit` tokens or so; `first` precedes."""
    context = min(context, len(ids))
    starts = np.arange(0, len(ids), context)
    chosen = np.linspace(0, len(starts) - 1, max(1, min(len(starts), -(-limit // context))))
    starts = starts[np.unique(chosen.astype(np.int64))][run.rank::run.world]
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for group in np.array_split(starts, max(1, len(starts) * context // 8192)):
        tokens, targets = np.zeros((2, len(group), context), np.int64)
        targets[:] = -100
        for row, start in enumerate(group):
            block = ids[start:start + context].astype(np.int64)
            tokens[row, 0] = first if start == 0 else ids[start - 1]
            tokens[row, 1:len(block)], targets[row, :len(block)] = block[:-1], block
        if len(group):
            batch = {"tokens": torch.from_numpy(tokens).to(run.device),
                     "targets": torch.from_numpy(targets).to(run.device)}
            with run.autocast():
                nats, targets_seen = next_token_loss(model, batch)
            total, count = total + nats.item(), count + targets_seen.item()
    model.train(was_training)
    total, count = run.sum(total, count)
    return total / count


def compressed(corpus: Corpus) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9e need for the held-out text (its first 16 MB)."""
    ids = corpus.val[:8 << 20]
    data = corpus.tokenizer.decode(ids[ids != corpus.tokenizer.end_id].tolist()).encode()[:16 << 20]
    return {"gzip": 8 * len(gzip.compress(data, 9)) / len(data),
            "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)}

# ------------------------------------------------------------------------------------------ memory


def activation_bytes(model_class, config, context: int, loss) -> int:
    """Bytes that a sequence keeps in fp32 to go back: counted on a twin that has no memory."""
    with torch.device("meta"):
        twin = model_class(config).train()
        tokens = torch.zeros((1, context), dtype=torch.int64)
    own, kept = {p.untyped_storage()._cdata for p in twin.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage      # held, so that no other gets its address
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(twin, {"tokens": tokens, "targets": tokens})
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


def plan_memory(settings: Settings, run: Run, model_class, config, sequences: int, loss,
                held: int, learn: int) -> None:
    """Say what training needs beside what there is, and set how many sequences go at once.

    held: parameters in memory; learn: those of them with a gradient and Adam's two means."""
    each = activation_bytes(model_class, config, settings.context, loss)
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


def smaller(settings: Settings) -> str:
    """The next setting that needs less memory."""
    if settings.micro_batch > 1:
        return f"--micro-batch {settings.micro_batch // 2}"
    if not settings.checkpoint_activations:
        return "--checkpoint-activations"
    return f"--context {settings.context // 2}"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a RuntimeError of torch means that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) \
        or "out of memory" in str(error)


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
    """Recompute each block in the backward pass instead of keeping its activations."""
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for block in blocks:
        def recompute(*arguments, forward=block.forward):
            if torch.is_grad_enabled():
                return checkpoint(forward, *arguments, use_reentrant=False)
            return forward(*arguments)
        block.forward = recompute

# ---------------------------------------------------------------------------------------- the loop


def make_optimizer(settings: Settings, model) -> torch.optim.Optimizer:
    """AdamW over the model's own groups and constants; fused where the device has it."""
    groups = [group for group in model.parameter_groups(settings.weight_decay) if group["params"]]
    try:
        return torch.optim.AdamW(groups, lr=0.0, **model.OPTIMIZER, fused=True)
    except RuntimeError:
        return torch.optim.AdamW(groups, lr=0.0, **model.OPTIMIZER)


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then half a cosine down to final_lr of the peak."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    part = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * part))                       # from 1 to 0
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * cosine)


def compiled(settings: Settings, run: Run, model, batch, loss):
    """The loss, compiled if asked for or worth it; a compiler that fails costs only a line."""
    if settings.compile == "off" or (settings.compile == "auto" and run.device.type != "cuda"):
        return loss
    try:
        fast = torch.compile(loss)
        start = time.perf_counter()
        with run.autocast():
            fast(model, to_device(batch, run.device))[0].backward()
        model.zero_grad(set_to_none=True)
        run.say(f"compile    done in {time.perf_counter() - start:.0f} s")
        return fast
    except Exception as error:               # missing compilers fail in many ways
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        model.zero_grad(set_to_none=True)
        run.say(f"compile    does not work here, going on without ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0][:100]})")
        return loss


def to_device(batch: dict, device: torch.device) -> dict:
    """Every tensor of a batch on the device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


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


def gradients(settings, run: Run, model, parts: list[dict], loss, scaler) -> tuple[float, float]:
    """Fill .grad with the gradient of the mean over all targets of a step; (mean loss, targets).

    Sums are accumulated and divided once, by the number of targets on all processes: unequal
    micro-batches, and any number of processes, give the gradient of one large batch.
    """
    total, count, nominal = 0.0, 0, settings.tokens_per_step
    for part in parts:
        with run.autocast():
            nats, targets = loss(model, to_device(part, run.device))
        scaler.scale(nats / nominal).backward()
        total, count = total + nats.detach(), count + targets
    total, count = run.sum(float(total), float(count))
    for parameter in model.parameters():
        if parameter.requires_grad and run.world > 1:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        if parameter.grad is not None:
            parameter.grad.mul_(nominal / max(count, 1.0))
    return total / max(count, 1.0), count


def fit(settings: Settings, run: Run, model, batches, loss, *, validate, sample, save,
        resumed: dict | None = None) -> dict:
    """Train `model`; returns the last measures of `validate`.

    batches(step) gives this process's micro-batches of a step; loss(model, batch) gives the summed
    loss of one and the number of its targets. validate(model, last) gives a dict of measures,
    sample(model) a text to show, and save(state) keeps what a resumed run needs.
    """
    optimizer, start = make_optimizer(settings, model), 0
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    if resumed:
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        start = resumed["step"]
        run.log(event="resume", step=start)
    step_loss = compiled(settings, run, model, batches(start)[0], loss)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    skipped, saved, speeds, measures = 0, time.time(), [], {}

    def keep(step):
        save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
              "scaler": scaler.state_dict(), "step": step})
    with Interrupt() as interrupt:
        for step in range(start, settings.steps):
            begun = time.perf_counter()
            torch.manual_seed((settings.seed * 1_000_003 + step) * run.world + run.rank)
            lr = learning_rate(settings, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            mean, count = gradients(settings, run, model, batches(step), step_loss, scaler)
            scaler.unscale_(optimizer)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.clip))
            if math.isfinite(mean) and math.isfinite(norm):
                scaler.step(optimizer)
                skipped = 0
            else:
                skipped += 1
                run.say(f"step {step + 1}: loss {mean:.4g}, gradient norm {norm:.4g}: skipped")
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - begun
            speeds = [*speeds[-19:], seconds]
            left = statistics.median(speeds) * (settings.steps - step - 1)
            speed = count / seconds
            run.say(f"step {step + 1}/{settings.steps}  loss {mean:.4f}  "
                    f"lr {lr:.2e}  norm {norm:.2f}  {speed:,.0f} tokens/s  {clock(left)} left")
            run.log(step=step + 1, loss=mean, lr=lr, norm=norm, tokens_per_s=speed, skipped=skipped,
                    seconds=time.time() - STARTED, peak_bytes=peak_bytes(run.device))
            last = step + 1 == settings.steps
            if skipped == 10:
                raise ValueError("ten steps in a row had no finite loss or gradient: the last good "
                                 f"state is that of step {step - 9}; try a lower --lr")
            if last or (step + 1) % settings.eval_every == 0:
                measures = validate(model, last)
                run.log(step=step + 1, **measures)
                run.say("           validation: " + shown(measures))
            if last or (step + 1) % settings.sample_every == 0:
                run.say(sample(model))
            stop = max(run.sum(interrupt.signal))
            overdue = run.rank == 0 and time.time() - saved >= 60 * settings.save_minutes
            if last or stop or run.sum(float(overdue))[0]:
                keep(step + 1)
                saved = time.time()
            if stop:
                run.say(f"stopped after step {step + 1}; to go on:  "
                        f"python {Path(sys.argv[0]).name} --resume {run.out}")
                raise SystemExit(128 + int(interrupt.signal or stop))
    if start == settings.steps:              # all was done, but perhaps not published
        measures = validate(model, True)
        keep(start)
    return measures


def shown(measures: dict[str, float]) -> str:
    """Measures on one line."""
    return ", ".join(f"{name} {value:.4f}" for name, value in measures.items())


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

# ----------------------------------------------------------------------------------- run directory


def make_run_directory(settings: Settings) -> Path:
    """A new directory: the one asked for, if it holds nothing, or the next free out/MODEL-N."""
    if settings.out:
        out = Path(settings.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} is not empty: --resume {out} goes on with a run, "
                             "another --out starts one")
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in range(1, 10**6):
        out = Path("out", settings.model + (f"-{number}" if number > 1 else ""))
        try:
            out.mkdir(parents=True)
        except FileExistsError:
            continue
        return out


def write_text(path: Path, content: str) -> None:
    """Replace a text file as a whole."""
    Path(f"{path}.part").write_text(content, encoding="utf-8")
    os.replace(f"{path}.part", path)


def publish(model, tokenizer, settings: Settings, out: Path) -> None:
    """Write what readers open: weights in the published layout, tokenizer, settings, picture."""
    model.save_pretrained(out)
    tokenizer.save(out, model_max_length=model.config.context)
    write_text(out / "generation_config.json", json.dumps(
        {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id,
         "pad_token_id": model.config.pad_token_id, "do_sample": True, "temperature": 0.8},
        indent=2) + "\n")
    write_settings(settings, out)
    draw_log(out)


def write_settings(settings: Settings, out: Path) -> None:
    """settings.json: what `--settings FILE` repeats."""
    values = {name: value for name, value in dataclasses.asdict(settings).items()
              if name not in ("out", "resume", "settings")}
    write_text(out / "settings.json", json.dumps(values, indent=2) + "\n")


def save_resume(state: dict, settings: Settings, config, tokenizer, key: str, out: Path) -> None:
    """Replace resume.pt, complete in itself: a kill at any moment leaves the old or the new."""
    files = {name: data.decode("latin-1") for name, data in tokenizer.files().items()}
    torch.save({**state, "settings": dataclasses.asdict(settings), "tokenizer": files, "data": key,
                "config": dataclasses.asdict(config), "chat_format": tokenizer.chat_format},
               out / "resume.pt.part")
    os.replace(out / "resume.pt.part", out / "resume.pt")


def load_resume(out: Path) -> dict:
    """What save_resume wrote; ValueError or OSError of one line."""
    if not (out / "resume.pt").exists():
        raise FileNotFoundError(f"--resume {out}: no resume.pt there, nothing was saved yet")
    saved = read_pickle(out / "resume.pt")
    if "eos_token_id" not in saved.get("config", {}):
        raise ValueError(f"{out}/resume.pt was written by an earlier version, whose optimiser had "
                         f"other groups: train on from its weights with --init-from {out}")
    return saved


def resume_settings(kind: type, saved: dict, asked: Settings, given: set[str], out: Path,
                    harmless: set[str] = HARMLESS):
    """The run's own settings; what was given beside --resume may not change the result."""
    settings = kind(**saved)
    for name in given - {"resume"}:
        if name not in harmless and getattr(asked, name) != getattr(settings, name):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(asked, name)} would change the "
                             f"result: {out} was started with {getattr(settings, name)}")
        setattr(settings, name, getattr(asked, name))
    settings.resume, settings.out = str(out), str(out)
    return settings


def logged(out: Path, name: str) -> dict[int, float]:
    """step -> value of one measure in log.jsonl; of a repeated step, the last."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {event["step"]: event[name] for event in map(json.loads, lines) if name in event}


def draw_log(out: Path) -> None:
    """loss.png of the losses in log.jsonl, and of what else was validated, where matplotlib is
    installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    train, val = logged(out, "loss"), logged(out, "val_loss")
    others = {name: found for name in ("accuracy", "reward") if (found := logged(out, name))}
    figure, panels = pyplot.subplots(1 + len(others), figsize=(7, 4 + 2 * len(others)), sharex=True,
                                     squeeze=False, layout="constrained")
    axes, *more = panels[:, 0]
    axes.plot(list(train), list(train.values()), lw=0.8, label="training")
    if val:
        axes.plot(list(val), list(val.values()), "o-", label="validation")
    axes.set(ylabel="loss (nats)", title=out.name)
    axes.legend()
    for panel, (name, found) in zip(more, others.items()):
        panel.plot(list(found), list(found.values()), "o-", color="C1")
        panel.set(ylabel=f"validation: {name}")
    panels[-1, 0].set(xlabel="step")
    figure.savefig(out / "loss.png.part", format="png", dpi=120)
    pyplot.close(figure)
    os.replace(out / "loss.png.part", out / "loss.png")


def curve(losses: list[float], columns: int = 72, rows: int = 8) -> str:
    """The losses as a curve of characters, for a terminal without pictures."""
    parts = [part.mean() for part in np.array_split(losses, min(columns, len(losses)))]
    low, high = min(parts), max(parts)
    level = [round((p - low) / max(high - low, 1e-9) * (rows - 1)) for p in parts]
    lines = ["".join("*" if at == row else " " for at in level) for row in reversed(range(rows))]
    marks = [f"{high:8.3f}", *[" " * 8] * (rows - 2), f"{low:8.3f}"]
    return "\n".join(f"{mark} |{line}" for mark, line in zip(marks, lines))

# -------------------------------------------------------------------------------------------- main


def fill_defaults(settings: Settings, given: set[str]) -> None:
    """Decide what was left open and does not need the data or the model."""
    if settings.init_from:
        found = identify(locate(settings.init_from))
        if "model" in given and settings.model != found:
            raise ValueError(f"--model {settings.model}: {settings.init_from} is {found}")
        settings.model = found
    shaped = {name for name in ("layers", "width", "size") if getattr(settings, name)}
    if shaped and (settings.init_from or "size" in shaped and len(shaped) > 1):
        raise ValueError("--init-from, --size and --layers --width each decide the sizes: give one")
    if settings.steps and settings.minutes:
        raise ValueError("--steps and --minutes each decide how long it takes: give one")
    if settings.vocab and (settings.tokenizer or settings.init_from):
        raise ValueError("--vocab is for a new tokenizer: --tokenizer and --init-from have theirs")
    own = not (settings.init_from or settings.size)
    if own:
        settings.layers, settings.width = settings.layers or 2, settings.width or 192
    if not (settings.tokenizer or settings.init_from):
        settings.vocab = settings.vocab or 4096
    if settings.sample_prompt is None:
        settings.sample_prompt = "" if settings.data else "def"
    settings.context = settings.context or (256 if own else 1024)
    settings.tokens_per_step = settings.tokens_per_step or (1024 if own else 16384)
    if settings.lr is None:
        settings.lr = 3.5e-3 * math.sqrt(192 / settings.width) if own else 6e-4
        settings.lr = 1e-4 if settings.init_from else settings.lr
    if settings.steps is None and settings.minutes is None:
        settings.steps = 1800


def fill_schedule(settings: Settings, run: Run, model, batches, loss) -> None:
    """Decide the number of steps, for --minutes by timing some, and what follows from it."""
    if settings.minutes is not None and settings.steps is None:
        parts = batches(0)
        scaler = torch.amp.GradScaler(run.device.type, enabled=False)
        seconds = []
        for _ in range(4):
            seconds.append(timed(lambda: gradients(settings, run, model, parts, loss, scaler)))
            model.zero_grad(set_to_none=True)
        each = run.sum(1.1 * statistics.median(seconds[1:]))[0] / run.world     # with optimiser
        left = run.sum(60 * settings.minutes - (time.time() - STARTED))[0] / run.world
        settings.steps = max(1, int(0.9 * left / each))                         # 0.1: validation
        settings.minutes = None
        run.say(f"time       {each:.2f} s a step: {settings.steps} steps in {left:.0f} s")
    settings.warmup = settings.steps // 10 if settings.warmup is None else settings.warmup
    settings.eval_every = settings.eval_every or max(1, settings.steps // 10)
    settings.sample_every = settings.sample_every or max(1, settings.steps // 4)


def train(settings: Settings, given: set[str]) -> None:
    """The script: data, model, plan, loop."""
    resumed = None
    if settings.resume:
        resumed = load_resume(Path(settings.resume))
        settings = resume_settings(Settings, resumed["settings"], settings, given,
                                   Path(settings.resume))
    else:
        fill_defaults(settings, given)
    run = start_run(settings)
    corpus = prepare_corpus(settings, run, tokenizer_of(resumed) if resumed else None)
    if resumed and corpus.key != resumed["data"]:
        raise ValueError(f"--resume {settings.out}: the data have changed since it was started")
    tokenizer = corpus.tokenizer
    model_class, config, model = open_model(settings, tokenizer)
    if "context" in given and settings.context > (config.context or settings.context):
        raise ValueError(f"--context {settings.context}: the model's is {config.context}")
    settings.context = min(settings.context, config.context or settings.context)
    sequences = max(1, settings.tokens_per_step // settings.context)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    plan_memory(settings, run, model_class, config, sequences, next_token_loss, count, count)
    torch.manual_seed(settings.seed)
    model = (model or model_class(config)).to(run.device).train()
    if resumed:
        model.load_state_dict(resumed["model"])
    if settings.checkpoint_activations:
        checkpoint_blocks(model)
    run.say(f"model      {settings.model}, {count:,} parameters: {config}")

    def check(model, last):
        nats = validate(model, run, corpus.val, settings.context, tokenizer.end_id,
                        len(corpus.val) if last else settings.eval_tokens)
        bits = nats / math.log(2) * len(corpus.val) / corpus.val_bytes
        return {"val_loss": nats, "bits_per_byte": bits} | (rivals if last else {})

    def sample(model):
        prompt = [tokenizer.end_id, *tokenizer.encode(settings.sample_prompt)]
        model.eval()
        room = (config.context or 10**6) - len(prompt)
        [new] = model.generate([prompt], min(150, room), temperature=0.8, top_p=0.9,
                               stop=[tokenizer.end_id], seed=settings.seed)
        model.train()
        return "--- sample ---\n" + settings.sample_prompt + tokenizer.decode(new) + "\n---"
    rivals = compressed(corpus)
    if settings.eval_only:
        measures = check(model, True)
        run.say("validation " + shown(measures))
        return
    batches = Batches(corpus.train, settings.context, sequences, settings.micro_batch,
                      settings.seed, run)
    if batches.context < settings.context:
        run.say(f"warning    {len(corpus.train)} tokens are less than a context of "
                f"{settings.context}: sequences are {batches.context} long")
    tokens = settings.tokens_per_step = sequences * batches.context
    fill_schedule(settings, run, model, batches, next_token_loss)
    epochs = settings.steps * tokens / len(corpus.train)
    run.say(f"plan       {settings.steps} steps of {tokens} tokens, {epochs:.2f} epochs, "
            f"{settings.micro_batch} sequences of {batches.context} at once, "
            f"learning rate {settings.lr:.2g}")
    run.say(f"to beat    gzip -9 {rivals['gzip']:.3f}, xz -9e {rivals['xz']:.3f} bits per byte of "
            "the held-out text")
    if run.rank == 0:
        run.out = Path(settings.out) if resumed else make_run_directory(settings)
        settings.out = str(run.out)
        run.say(f"run        {run.out}")
        write_settings(settings, run.out)
        tokenizer.save(run.out, model_max_length=config.context)

    def save(state):
        if run.rank == 0:
            save_resume(state, settings, config, tokenizer, corpus.key, run.out)
            publish(model, tokenizer, settings, run.out)
    measures = fit(settings, run, model, batches, next_token_loss, validate=check, sample=sample,
                   save=save, resumed=resumed)
    if run.rank == 0:
        finish(settings, run, measures)


def tokenizer_of(resumed: dict):
    """The tokenizer inside a resume.pt."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in resumed["tokenizer"].items():
            Path(folder, name).write_bytes(content.encode("latin-1"))
        tokenizer = text.load_tokenizer(folder)
    tokenizer.chat_format = resumed["chat_format"]
    return tokenizer


def finish(settings: Settings, run: Run, measures: dict) -> None:
    """Say how it ended and what to do with it."""
    losses = logged(run.out, "loss")
    if losses and not (run.out / "loss.png").exists():
        run.say(curve([*losses.values()]))
    run.say(f"\n{measures['bits_per_byte']:.3f} bits per byte of the held-out text; gzip -9 needs "
            f"{measures['gzip']:.3f}, xz -9e {measures['xz']:.3f}")
    run.say(f"{clock(time.time() - STARTED)} in all, peak memory "
            f"{peak_bytes(run.device) / 2**30:.2f} GB. Talk to it:\n"
            f"python chat.py {run.out} --prompt \"def \"")


def main(argv: list[str] | None = None) -> None:
    """`python train.py`."""
    argv = sys.argv[1:] if argv is None else argv
    run_script("train.py", train, *parse_settings(Settings, argv, __doc__.split("\n")[0]))


def run_script(name: str, script, settings: Settings, given: set[str]) -> None:
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
