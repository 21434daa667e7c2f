"""Fine-tune any model of this project: on answers, labels, preferences or rewards.

    python finetune.py --task sft      --init-from out/gpt     learn to answer
    python finetune.py --task classify --init-from out/gpt     learn to label texts
    python finetune.py --task dpo      --init-from out/gpt     learn which of two answers is better
    python finetune.py --task grpo     --init-from out/gpt     learn what earns a reward

Each has data of its own, read from the source of Python's standard library: what a function does,
which package a docstring comes from, whose docstring it is, function headers to complete. Yours:

    sft       .jsonl or .json of {"instruction", "input", "output"}, {"messages"}, or
              {"prompt", "completion"}
    classify  .csv, .tsv, .jsonl or .json with text and label; then --predict FILE
    dpo       .jsonl or .json of {"prompt", "chosen", "rejected"}
    grpo      .jsonl or .json of {"prompt"}, and --reward FILE.py with reward(prompt, completion)

--lora RANK trains two small matrices beside each large one, and keeps only them: an adapter, which
peft opens for the models that transformers knows. What comes out is a run directory for chat.py.

From the top: settings; the default data; reading; sequences and batches; LoRA; the four tasks;
loading and saving; `main`. All that is not special to fine-tuning is imported from train.py.

References: Hu et al. 2021, "LoRA"; Rafailov et al. 2023, "Direct Preference Optimization"; Shao et
al. 2024, "DeepSeekMath" (GRPO); Yu et al. 2025, "DAPO" (the mean over tokens, not over sequences).
"""
import argparse
import ast
import contextlib
import copy
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokenizer as text
import train
from train import read_json
from train import flag, next_token_loss, to_device

# ---------------------------------------------------------------------------------------- settings

HIDDEN = argparse.SUPPRESS                   # flags of train.py that a checkpoint has decided
TASKS = ("sft", "classify", "dpo", "grpo")


@dataclass
class Settings(train.Settings):
    """What was asked; None means: decided by the script, which says what it chose."""
    task: str | None = flag(None, "what is learnt", choices=TASKS)
    data: list[str] = flag([], "files of examples (default: made from Python's standard library)")
    val: list[str] = flag([], "files of examples to measure on (default: a part of the data)")
    hold_out: float = flag(0.1, "that part of the data, if no --val is given", above=0, high=0.5)
    split_seed: int = flag(0, "decides which examples are held out")
    chat: str | None = flag(None, "chat format, or none: plain text (default: the tokenizer's own, "
                            "else alpaca)", choices=("none", *text.CHAT_FORMATS))
    context: int | None = flag(None, "examples are cut at so many tokens (default 1024)", low=16)
    batch: int | None = flag(None, "examples in one step (default 16; grpo: 8 prompts)", low=1)
    epochs: float | None = flag(None, "times each is seen (default: by task)", above=0)
    steps: int | None = flag(None, "optimiser steps, instead of --epochs", low=1)
    lr: float | None = flag(None, "peak learning rate (default: by task and width)", above=0)
    weight_decay: float = flag(0.0, "decay of matrices", low=0)
    compile: str = flag("off", "compile the step", choices=("auto", "on", "off"))
    eval_examples: int = flag(256, "held-out examples of a measurement on the way", low=1)
    samples: int = flag(2, "how many samples to show", low=0)
    lora: int | None = flag(None, "train an adapter of this rank instead of the matrices", low=1)
    lora_alpha: float | None = flag(None, "its strength (default: twice the rank)", above=0)
    lora_targets: str = flag(r"\.\d+\.", "which matrices get one, a regular expression on their "
                             "names (by default all of every block)")
    merge: bool = flag(False, "write merged weights, no adapter; without --task: only that")
    all_tokens: bool = flag(False, "sft: learn the prompts as well as the replies")
    tune: str = flag("all", "classify: train all blocks or the last one", choices=("last", "all"))
    balance: bool = flag(False, "classify: drop examples until all labels have as many")
    predict: str | None = flag(None, "classify: label the texts of this file, and stop")
    beta: float = flag(0.1, "dpo: what leaving the start costs", above=0)
    label_smoothing: float = flag(0.0, "dpo: part of wrong preferences", low=0, high=0.5)
    reward: str | None = flag(None, "grpo: a file, EXECUTED, with reward(prompt, completion)")
    group: int = flag(8, "grpo: completions of each prompt", low=2)
    max_new_tokens: int = flag(64, "longest completion of grpo, and of samples", low=1)
    temperature: float = flag(0.8, "grpo: of sampling", above=0)
    updates: int = flag(2, "grpo: steps on the same completions", low=1)
    clip_ratio: float = flag(0.2, "grpo: how far they may change a probability", above=0)
    kl: float = flag(0.05, "grpo: weight of the divergence from the start", low=0)
    model: str | None = flag(None, HIDDEN)
    size: str | None = flag(None, HIDDEN)
    layers: int | None = flag(None, HIDDEN)
    width: int | None = flag(None, HIDDEN)
    vocab: int | None = flag(None, HIDDEN)
    minutes: float | None = flag(None, HIDDEN)
    tokens_per_step: int | None = flag(None, HIDDEN)
    eval_tokens: int | None = flag(None, HIDDEN)
    sample_prompt: str | None = flag(None, HIDDEN)
    workers: int | None = flag(None, HIDDEN)

# ------------------------------------------------------------------------------------ default data


def definitions():
    """Yield (dotted name, node, lines of its file) of each public function and class of Python's
    standard library. Its sources are parsed; nothing is imported."""
    def inside(node, name):
        for child in node.body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(child, kinds) and not child.name.startswith("_"):
                yield f"{name}.{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, f"{name}.{child.name}")
    for file, path in train.standard_library():
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if all(part.isidentifier() and part[0] != "_" for part in module.split(".")):
            source = path.read_bytes()
            with contextlib.suppress(SyntaxError, ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")                         # of old escapes
                tree, lines = ast.parse(source), source.decode("utf-8", "replace").splitlines()
                for name, node in inside(tree, module.replace("posixpath", "os.path")):
                    yield name, node, lines


def question_rows() -> list[dict]:
    """{"instruction", "output"}: what a function does, in the first paragraph of its docstring; of
    functions with the same one the first, so that no held-out answer stands in what is learnt."""
    found = {}
    for name, node, _ in definitions():
        if not isinstance(node, ast.ClassDef) and (doc := ast.get_docstring(node)):
            found.setdefault(" ".join(doc.split("\n\n")[0].split()), f"What does `{name}` do?")
    return [{"instruction": question, "output": answer}
            for answer, question in found.items() if answer]


def label_rows() -> list[dict]:
    """{"text", "label"}: docstrings, none twice, and which package they come from."""
    packages = "asyncio email http logging multiprocessing tkinter unittest xml".split()
    labels = dict(zip(packages, packages)) | {"concurrent": "multiprocessing", "urllib": "http"}
    seen = {}
    for name, node, _ in definitions():
        label, doc = labels.get(name.split(".")[0]), ast.get_docstring(node)
        if label and doc and doc.strip():
            seen.setdefault(doc.strip(), label)
    return [{"text": doc, "label": label} for doc, label in seen.items()]


def preference_rows() -> list[dict]:
    """{"prompt", "chosen", "rejected"}: a function's docstring rather than another's."""
    rows = question_rows()
    others = [row["output"] for row in rows]
    random.Random(0).shuffle(others)
    return [{"prompt": row["instruction"], "chosen": row["output"], "rejected": other}
            for row, other in zip(rows, others) if other != row["output"]]


def header_rows() -> list[dict]:
    """{"prompt"}: headers, none twice, of functions and methods that are short and would themselves
    earn the reward."""
    found = {}
    for _, node, lines in definitions():
        bodies = node.body[ast.get_docstring(node, clean=False) is not None:]
        if isinstance(node, ast.FunctionDef) and bodies:
            header = "\n".join(lines[node.lineno - 1:node.body[0].lineno - 1]) + "\n"
            body = "\n".join(lines[bodies[0].lineno - 1:node.end_lineno])
            both, length = textwrap.dedent(header + body), len(textwrap.dedent(header))
            if len(both) < 160 and code_reward(both[:length], [both[length:]], [True]) == [1.0]:
                found[both[:length]] = None
    return [{"prompt": header} for header in found]


def statements(source: str) -> set[str] | None:
    """The distinct statements of a program, but for its first and those that do nothing (`pass`, a
    constant or a name alone); None if it is not Python."""
    def works(node):
        inside = node.value if isinstance(node, ast.Expr) else node
        idle = isinstance(inside, (ast.Pass, ast.Constant, ast.Name))
        return isinstance(node, ast.stmt) and not idle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        return {ast.dump(node) for node in ast.walk(tree)
                if works(node) and node not in tree.body[:1]}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def code_reward(prompt: str, completions: list[str], ended: list[bool]) -> list[float]:
    """1 for each completion that makes Python of the prompt, ended by itself, and has at least two
    statements that its group did not have yet; else 0."""
    rewards, seen = [], set()
    for completion, end in zip(completions, ended):
        new = (statements(prompt + completion) or set()) - seen if end else set()
        rewards.append(float(len(new) >= 2))
        seen |= new
    return rewards


DEFAULT_ROWS = {"sft": question_rows, "classify": label_rows, "dpo": preference_rows,
                "grpo": header_rows}

# ----------------------------------------------------------------------------------------- reading


def read_rows(data: list[str]) -> list[dict]:
    """The rows of .jsonl, .json, .csv, .tsv and .txt files; "where" tells each row's place."""
    rows = []
    for _, path in text.find_files(data):
        try:
            content, kind = path.read_text(encoding="utf-8-sig"), path.suffix.lower()
            lines = content.removesuffix("\n").split("\n")
            if kind == ".jsonl":
                found = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
            elif kind == ".json":
                found = [*enumerate(json.loads(content), 1)]
            elif kind == ".csv":
                csv.field_size_limit(2**31 - 1)
                table = csv.DictReader(io.StringIO(content, newline=""), strict=True)
                found = [(table.line_num, row) for row in table]
            elif kind == ".tsv":
                found = tab_separated(content, lines)
            elif kind == ".txt":
                found = [(n, {"text": line}) for n, line in enumerate(lines, 1)]
            else:
                raise ValueError("take .jsonl, .json, .csv or .tsv; .txt for --predict")
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        for n, row in found:
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {n}: an object is needed, not {row!r:.60}")
            rows.append({**row, "where": f"{path}, row {n}"})
    return rows


def tab_separated(content: str, lines: list[str]) -> list[tuple[int, dict]]:
    """(line, row) of a .tsv file, where quotes may be only characters; two columns without names
    are label and text, as in the SMS Spam Collection."""
    names = [name.strip('"') for name in lines[0].split("\t")]
    if len(names) == 2 and not {"text", "label"} & set(names):
        return [(n, dict(zip(("label", "text"), line.split("\t", 1))))
                for n, line in enumerate(lines, 1)]
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        table = csv.DictReader(io.StringIO(content, newline=""), delimiter="\t", strict=True,
                               quoting=quoting)
        with contextlib.suppress(csv.Error):
            return [(table.line_num, row) for row in table]
    raise ValueError("it is no table")


def strings(row: dict, *names: str) -> list[str]:
    """These fields of a row; ValueError with what it has instead."""
    for name in names:
        if not isinstance(row.get(name), str):
            has = ", ".join(str(key) for key in row if key != "where")
            raise ValueError(f"{row.get('where', 'a row')} has {has}: it needs a text \"{name}\"")
    return [row[name] for name in names]


def label_of(row: dict) -> str:
    """The label of a row, as text."""
    label = str(row["label"]).strip() if row.get("label") is not None else ""
    if not label:
        raise ValueError(f"{row.get('where', 'a row')} has no \"label\"")
    return label


def conversation(row: dict, reply: str = "completion") -> list[dict]:
    """The messages of a row: as they are, in Alpaca's form, or a prompt and a reply, where each may
    be a list of messages. A reply may hold its prompt."""
    asked = next((name for name in ("messages", "instruction") if name in row), "prompt")
    said = reply if reply in row else {"instruction": "output", "prompt": reply}.get(asked)
    fields = [(name, role) for name, role in ((asked, "user"), (said, "assistant")) if name]
    first = row[said][:1] if isinstance(row.get(said), list) else []
    if first and isinstance(first[0], dict) and first[0].get("role") != "assistant":
        fields = fields[1:]                  # the reply holds the prompt
    messages = []
    for name, role in fields:
        messages += row[name] if isinstance(row.get(name), list) else [
            {"role": role, "content": strings(row, name)[0]}]
    if not messages or not all(isinstance(message, dict) for message in messages):
        where = row.get("where", "a row")
        raise ValueError(f"{where}: messages are [{{\"role\", \"content\"}}, ...]")
    more = {"input": row["input"]} if fields[0][0] == "instruction" and row.get("input") else {}
    return [messages[0] | more, *messages[1:]]


def chat_parts(tokenizer, messages: list[dict], where="") -> list[tuple[list[int], bool]]:
    """tokenizer.chat_parts; without a chat format, prompt and completion as plain text."""
    try:
        if tokenizer.chat_format != "alpaca":                           # it alone knows "input"
            messages = [{"role": m["role"], "content": f"{m['content']}\n\n{m['input']}"}
                        if m.get("input") else m for m in messages]
        if tokenizer.chat_format:
            return tokenizer.chat_parts(messages)
        if [m["role"] for m in messages] not in (["user"], ["user", "assistant"]):
            raise ValueError("--chat none takes one prompt and one completion")
        prompt, *reply = [tokenizer.encode(m["content"]) for m in messages]
        prompt = [*tokenizer.prefix_ids, *prompt] or ending(tokenizer)
        return [(prompt, False)] + [(ids + ending(tokenizer), True) for ids in reply]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def ending(tokenizer) -> list[int]:
    """The ids that end a reply."""
    if not tokenizer.chat_format:
        return [tokenizer.stop_ids[0] if tokenizer.end_id is None else tokenizer.end_id]
    silence = [{"role": role, "content": ""} for role in ("user", "assistant")]
    reply = tokenizer.chat_parts(silence)[-1][0]
    return reply if tokenizer.chat_format == "world" else reply[-1:]    # there: a blank line

# --------------------------------------------------------------------------- sequences and batches


def sequence(tokenizer, messages, limit: int, where="", everything=False):
    """(inputs, targets), at most `limit` ids each: of a conversation, of which the replies are to
    be learnt; -100 is no target. A reply that is cut still ends. None if no reply is left."""
    parts, end = chat_parts(tokenizer, messages, where), ending(tokenizer)
    ids = [id for part, _ in parts for id in part]
    reply = [is_reply for part, is_reply in parts for _ in part]
    if len(ids) > limit + 1:
        cut = reply[limit] and reply[limit + 1]                         # in the middle of a reply
        ids, reply = ids[:limit + 1], reply[:limit + 1]
        if cut and all(reply[-len(end) - 1:]):                          # more than the end is left
            ids[-len(end):] = end
        while reply and not (all(reply[-len(end):]) and ids[-len(end):] == end):
            ids, reply = ids[:-1], reply[:-1]                           # questions without answer
    if not any(reply[1:]):
        return None
    return ids[:-1], [id if learn or everything else -100 for id, learn in zip(ids[1:], reply[1:])]


def length(example: dict) -> int:
    return max(len(inputs) for inputs, _ in example["rows"])


def groups(examples: list[dict], budget: int):
    """Yield lists of examples of similar length: at most `budget` ids each, padding included. One
    list more costs a small model the time of about 128 ids: an example may cost as much padding."""
    group = []
    for example in sorted(examples, key=length):
        rows, T = len(example["rows"]), length(example)
        if group and ((len(group) + 1) * rows * T > budget
                      or len(group) * rows * (T - length(group[-1])) > 128):
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def collate(examples: list[dict], context: int) -> dict[str, torch.Tensor]:
    """One batch: "tokens", "targets" (B, T) and "length" (B,) of all rows; their numbers, (b,).

    A row holds one example, then padding, which is no target. As no architecture looks to the
    right, nothing leaks from one example into another: not by attention, not by a memory. T is a
    multiple of 16, if the context allows: for each new shape, kernels must be found or compiled.
    """
    rows = [row for example in examples for row in example["rows"]]
    longest = max(map(length, examples))
    T = max(longest, min(-(-longest // 16) * 16, context))
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    targets = torch.full_like(tokens, -100)
    for i, (inputs, wanted) in enumerate(rows):
        tokens[i, :len(inputs)], targets[i, :len(inputs)] = map(torch.tensor, (inputs, wanted))
    numbers = {name: torch.tensor([example[name] for example in examples])
               for name, value in examples[0].items() if isinstance(value, (int, float))}
    lengths = torch.tensor([len(inputs) for inputs, _ in rows])
    return {"tokens": tokens, "targets": targets, "length": lengths, **numbers}


class Batches(train.Batches):
    """Examples for each step: all of them once an epoch, in a new order each time."""

    def __init__(self, examples: list[dict], settings: Settings, run: train.Run):
        self.examples, self.count, self.seed, self.run = examples, len(examples), settings.seed, run
        self.batch, self.context = settings.batch, settings.context
        self.budget = settings.micro_batch * settings.context
        self.epoch, self.order = -1, None

    def chosen(self, step: int) -> list[dict]:
        """The examples of a step that are this process's."""
        return [self.examples[self.place(step * self.batch + k)]
                for k in range(self.run.rank, self.batch, self.run.world)]

    def __call__(self, step: int) -> list[dict[str, torch.Tensor]]:
        return [collate(group, self.context) for group in groups(self.chosen(step), self.budget)]


def log_probs(model, batch: dict, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) fp32: the log-probability of each target, 0 where there is none; in pieces, so that no
    (B, T, V) logits are kept."""
    def piece(h, y):
        return -F.cross_entropy(model.logits(h[None])[0].float() / temperature, y, reduction="none")
    learnt = batch["targets"] != -100
    hidden, targets = model.hidden(batch["tokens"])[learnt], batch["targets"][learnt]   # (N, C)
    rows = max(1, (1 << 26) // model.config.vocab_size)                 # logits of 256 MB in fp32
    found = [checkpoint(piece, h, y, use_reentrant=False) if len(hidden) > rows else piece(h, y)
             for h, y in zip(hidden.split(rows), targets.split(rows))]
    return torch.zeros(learnt.shape, device=learnt.device).masked_scatter(learnt, torch.cat(found))

# -------------------------------------------------------------------------------------------- LoRA


class LoRALinear(nn.Linear):
    """W x + scale B A x. W stays as it was; A (rank, in) and B (out, rank) learn, B from 0."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        nn.Module.__init__(self)             # W is taken over, none is drawn
        self.weight, self.bias, self.scale, self.on = linear.weight, linear.bias, scale, True
        self.out_features, self.in_features = self.weight.shape
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))           # as its authors, and peft

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.on else y


def adapters(model) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def put_adapter(model, name: str, rank: int, scale: float) -> None:
    """Replace the matrix of this name by itself with an adapter."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, LoRALinear(model.get_submodule(name), rank, scale))


def add_lora(model, settings: Settings) -> None:
    """Give every matrix that --lora-targets means an adapter; only adapters learn.

    Not a tied head: its weight is the token table's.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)
             and not any(module.weight is table for table in tables)]
    try:
        meant = [name for name in names if re.search(settings.lora_targets, name)]
    except re.error as error:
        raise ValueError(f"--lora-targets {settings.lora_targets}: {error}") from None
    if not meant:
        raise ValueError(f"--lora-targets {settings.lora_targets} means no matrix of this model: "
                         f"it has {', '.join(names[:7])} ...")
    model.requires_grad_(False)
    for name in meant:
        put_adapter(model, name, settings.lora, settings.lora_alpha / settings.lora)


@contextlib.contextmanager
def without_adapters(model):
    """The model as it was at the start."""
    for module in adapters(model).values():
        module.on = False
    yield model
    for module in adapters(model).values():
        module.on = True


@torch.no_grad()
def merged(model):
    """The plain model that computes the same as this one with adapters; the rest is shared."""
    tensors = {name: tensor for name, tensor in model.state_dict().items()
               if not name.endswith(("lora_A", "lora_B"))}
    for name, m in adapters(model).items():
        tensors[f"{name}.weight"] = m.weight + m.scale * m.lora_B @ m.lora_A
    with torch.device("meta"):                                          # shapes, no memory
        plain = type(model)(model.config)
    plain.load_state_dict(tensors, strict=True, assign=True)
    first = {}                               # what is tied in one is tied in the other
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, plain.get_parameter(owner))
    return plain.eval()


def peft_prefix(model) -> str:
    """What peft has before our name of a matrix; the rest is transformers' name."""
    return "base_model.model." + "transformer." * (type(model).__name__ == "GPT")


def save_adapter(model, settings: Settings, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft does."""
    from safetensors.torch import save_file
    prefix, file = peft_prefix(model), out / "adapter_model.safetensors"
    tensors = {f"{prefix}{name}.lora_{part}.weight": getattr(module, f"lora_{part}").detach()
               for name, module in adapters(model).items() for part in "AB"}
    save_file(tensors, f"{file}.part", {"format": "pt"})
    os.replace(f"{file}.part", file)
    train.write_text(out / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": str(Path(settings.init_from).resolve()), "r": settings.lora,
        "lora_alpha": settings.lora_alpha, "lora_dropout": 0.0,
        "fan_in_fan_out": type(model).__name__ == "GPT",                # transformers' Conv1D
        "target_modules": [prefix.removeprefix("base_model.model.") + name
                           for name in adapters(model)]}, indent=2) + "\n")


def load_adapter(folder: Path, model) -> None:
    """Put the adapters of a folder in peft's layout into the model they were made for."""
    stated, prefix = read_json(folder / "adapter_config.json"), peft_prefix(model)
    for name, plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False),
                        ("alpha_pattern", {})):
        if (stated.get(name) or plain) != plain:
            raise ValueError(f"{folder}: {name} is {stated[name]!r}, only {plain!r} is supported")
    from safetensors.torch import load_file
    with train.readable(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
    for key in sorted(tensors):              # A before B
        name, _, part = key.removeprefix(prefix).rpartition(".lora_")
        module = dict(model.named_modules()).get(name)
        if part == "A.weight" and isinstance(module, nn.Linear):
            rank = len(tensors[key])
            scale = stated.get("lora_alpha", 8) / (  # peft's default
                math.sqrt(rank) if stated.get("use_rslora") else rank)
            put_adapter(model, name, rank, scale)
            module = model.get_submodule(name)
        own = getattr(module, f"lora_{part[:1]}", None)
        if own is None or own.shape != tensors[key].shape:
            raise ValueError(f"{folder}: {key} {tuple(tensors[key].shape)} is no adapter of this "
                             f"{type(model).__name__}: was it made for another model?")
        own.data.copy_(tensors[key])

# ------------------------------------------------------------------------------------------- tasks


class Task:
    """A task on a model. Its four kinds say what an example, the loss and the measures are.

    net is what is trained: the model, or the model with a head. measure(net, batch) gives a vector
    of sums over a batch, summary(sums) what they mean.
    """
    dropout = False                          # as the model was trained, or never

    def __init__(self, settings: Settings, run: train.Run, tokenizer, model):
        self.settings, self.run, self.tokenizer, self.model = settings, run, tokenizer, model
        self.net, self.train, self.val, self.config = model, [], [], model.config
        self.stop = {*tokenizer.stop_ids, *train.eos_tokens(model.config)}

    def prepare(self, rows: list[dict]) -> list[dict]:
        """Examples of rows; those of which cutting leaves nothing are left out."""
        made = [example for example in map(self.example, rows) if example]
        if len(made) < len(rows):
            self.run.say(f"data       {len(rows) - len(made)} examples are left out: no reply is "
                         f"left of them within --context {self.settings.context}")
        return made

    def parts(self, examples: list[dict]):
        """Yield (examples, their batch on the device), as much at once as fits."""
        for group in groups(examples, self.settings.micro_batch * self.settings.context):
            yield group, to_device(collate(group, self.settings.context), self.run.device)

    def batches(self):
        return Batches(self.train, self.settings, self.run)

    def begin(self, saved: dict) -> None:
        """Once before training, with what `kept` returned if a run goes on."""

    def kept(self) -> dict:
        """What a resumed run needs beside the weights."""
        return {}

    @torch.no_grad()
    def validate(self, net, last: bool) -> dict:
        """Measures over held-out examples: all of them at last, else --eval-examples."""
        examples, total = self.val if last else self.val[:self.settings.eval_examples], 0.0
        net.eval()
        for _, batch in self.parts(examples[self.run.rank::self.run.world] or examples[:1]):
            with self.run.autocast():
                total = total + self.measure(net, batch).cpu().double()
        net.train(self.dropout)
        return self.summary(self.run.sum(*total.tolist()))

    def save_pretrained(self, out: Path) -> None:
        """What train.publish writes of the weights."""
        if self.settings.lora and not self.settings.merge:
            return save_adapter(self.model, self.settings, out)
        merged(self.model).save_pretrained(out)


class SFT(Task):
    """Supervised fine-tuning: the next token, of replies only."""
    dropout = True

    def loss(self, net, batch):
        learnt = batch["targets"] != -100                               # no logits for the prompts
        hidden = net.hidden(batch["tokens"])[learnt]                    # (N, C)
        return train.cross_entropy(net, hidden[None], batch["targets"][learnt][None])

    def example(self, row: dict) -> dict | None:
        messages = conversation(row)
        while messages and messages[-1].get("role") == "user":          # a question at the end
            messages.pop()
        made = messages and sequence(self.tokenizer, messages, self.settings.context,
                                     row.get("where", ""), self.settings.all_tokens)
        return {"rows": [made], "messages": messages} if made else None

    def measure(self, net, batch):
        return torch.stack(self.loss(net, batch))

    def summary(self, sums):
        return {"val_loss": sums[0] / sums[1]}

    def sample(self, net) -> str:
        """Answers to held-out prompts."""
        shown = []
        net.eval()
        for *asked, right in [example["messages"] for example in self.val[:self.settings.samples]]:
            prompt = [id for part, _ in chat_parts(self.tokenizer, asked) for id in part]
            [new] = net.generate([prompt[:self.settings.context - 1]], self.settings.max_new_tokens,
                                 temperature=0, stop=self.stop)
            shown.append(f"prompt: {asked[-1]['content']}\n reply: "
                         f"{self.tokenizer.decode(new).strip()}\n right: {right['content']}")
        net.train(self.dropout)
        return "\n".join(shown)


def width(model) -> int:
    """Its number of channels C."""
    return next(m for m in model.modules() if isinstance(m, nn.Embedding)).embedding_dim


class Classifier(nn.Module):
    """A model and a linear head on the hidden vector of each row's last token."""

    def __init__(self, model, labels: list[str]):
        super().__init__()
        self.model, self.labels, self.OPTIMIZER = model, labels, model.OPTIMIZER
        self.head = nn.Linear(width(model), len(labels), device=next(model.parameters()).device)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, length):
        """(B, T) ids and (B,) lengths -> (B, labels) fp32 logits."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.head(self.model.hidden(tokens)[rows, length - 1]).float()

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        head = {"params": [*self.head.parameters()], "weight_decay": 0.0, "lr_scale": 1.0,
                "hidden_matrix": False}
        return [*self.model.parameter_groups(weight_decay), head]


class Classify(Task):
    """Which label a text has."""

    def __init__(self, settings, run, tokenizer, model, labels: list[str]):
        super().__init__(settings, run, tokenizer, model)
        self.net, self.confusion = Classifier(model, labels), None
        if not settings.lora and settings.tune == "last":               # and the norm after it
            blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
            inside, last = ({id(p) for p in m.parameters()} for m in (blocks, blocks[-1]))
            for p in model.parameters():
                p.requires_grad_(id(p) in last or p.dim() == 1 and id(p) not in inside)

    def example(self, row: dict) -> dict:
        labels, label = self.net.labels, label_of(row)
        if label not in labels:
            raise ValueError(f"{row.get('where', 'a row')}: label {label!r} is none of "
                             + ", ".join(labels))
        return {"rows": [self.row(row)], "label": labels.index(label)}

    def row(self, row: dict) -> tuple[list[int], list[int]]:
        [content] = strings(row, "text")
        ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(content)]
        ids = (ids or ending(self.tokenizer))[:self.settings.context]
        return ids, [-100] * len(ids)

    def loss(self, net, batch):
        logits = net(batch["tokens"], batch["length"])
        return F.cross_entropy(logits, batch["label"], reduction="sum"), len(logits)

    def measure(self, net, batch):
        logits, K = net(batch["tokens"], batch["length"]), len(self.net.labels)
        loss = F.cross_entropy(logits, batch["label"], reduction="sum")
        pairs = torch.bincount(batch["label"] * K + logits.argmax(-1), minlength=K * K)
        return torch.cat([loss[None], pairs])

    def summary(self, sums):
        self.confusion = torch.tensor(sums[1:]).view(len(self.net.labels), -1)   # (true, predicted)
        right, true, said = self.confusion.diag(), self.confusion.sum(1), self.confusion.sum(0)
        total, f1 = true.sum().item(), 2 * right / (true + said).clamp(min=1)
        return {"val_loss": sums[0] / total, "accuracy": right.sum().item() / total,
                "macro_f1": f1.mean().item(), "majority": true.max().item() / total}

    def sample(self, net) -> str:
        """The confusion matrix: a row for each true label, a column for what was said."""
        if self.confusion is None:           # a run that went on has measured nothing yet
            return ""
        wide = max(map(len, net.labels))
        head = " " * wide + "  said: " + ", ".join(net.labels) + "\n"
        return head + "\n".join(f"{label:>{wide}} " + "".join(f"{int(n):>6}" for n in row)
                                for label, row in zip(net.labels, self.confusion))

    @torch.no_grad()
    def predict(self, rows: list[dict]) -> None:
        """Print label, probability and text of each row, one on a line."""
        self.net.eval()
        for row in rows:
            batch = collate([{"rows": [self.row(row)]}], self.settings.context)
            batch = to_device(batch, self.run.device)
            with self.run.autocast():
                p, label = self.net(batch["tokens"], batch["length"]).softmax(-1)[0].max(-1)
            print(f"{self.net.labels[label]}\t{p:.3f}\t{' '.join(row['text'].split())}")

    def kept(self) -> dict:
        return {"labels": self.net.labels}

    def save_pretrained(self, out: Path) -> None:
        from safetensors.torch import save_file
        super().save_pretrained(out)
        save_file(self.net.head.state_dict(), out / "head.safetensors.part",
                  {"format": "pt", "labels": json.dumps(self.net.labels)})
        os.replace(out / "head.safetensors.part", out / "head.safetensors")


def dpo_loss(margin, smoothing: float):
    """-log sigmoid(margin); with smoothing, that part of the preferences is the other way."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


class DPO(Task):
    """Direct preference optimisation: of two replies, make the chosen one likelier.

    An example's margin is beta times how much its log-ratio, of the chosen reply to the rejected
    one, has grown since the start.
    """

    def example(self, row: dict) -> dict | None:
        pair = [sequence(self.tokenizer, conversation(row, reply), self.settings.context,
                         row.get("where", "")) for reply in ("chosen", "rejected")]
        return {"rows": pair, "row": row, "reference": 0.0} if all(pair) else None

    @torch.no_grad()
    def begin(self, saved: dict) -> None:
        """The log-ratios of the start, computed once."""
        examples = self.train + self.val
        if not saved:
            self.run.say(f"reference  log-probabilities of {len(examples)} pairs at the start")
            for group, batch in self.parts(examples[self.run.rank::self.run.world]):
                with self.run.autocast():
                    for example, ratio in zip(group, self.ratios(self.net, batch).tolist()):
                        example["reference"] = ratio
        ratios = saved.get("reference") or self.run.sum(*[e["reference"] for e in examples])
        for example, ratio in zip(examples, ratios):
            example["reference"] = ratio

    def kept(self) -> dict:
        return {"reference": [example["reference"] for example in self.train + self.val]}

    def ratios(self, net, batch):
        chosen, rejected = log_probs(net, batch).sum(1).view(-1, 2).unbind(1)       # (b,) each
        return chosen - rejected

    def margins(self, net, batch):
        return self.settings.beta * (self.ratios(net, batch) - batch["reference"])

    def loss(self, net, batch):
        margins = self.margins(net, batch)
        return dpo_loss(margins, self.settings.label_smoothing).sum(), len(margins)

    def measure(self, net, batch):
        margins = self.margins(net, batch)
        margins = margins * (margins.abs() > 1e-4)                      # below, it is rounding
        right = 0.5 + 0.5 * margins.sign()                              # a tie is half right
        losses = dpo_loss(margins, self.settings.label_smoothing)
        return torch.stack([losses, margins, right, torch.ones_like(right)]).sum(1)

    def summary(self, sums):
        loss, margin, right, count = sums
        return {"val_loss": loss / count, "margin": margin / count, "accuracy": right / count}

    @torch.no_grad()
    def sample(self, net) -> str:
        """Held-out pairs and their margins."""
        return "\n".join(
            f"margin {self.margins(net, batch).item():+.2f}  {example['row'].get('prompt')!r:.70}\n"
            f"    chosen   {example['row']['chosen']!r:.80}\n"
            f"    rejected {example['row']['rejected']!r:.80}"
            for example in self.val[:self.settings.samples] for _, batch in self.parts([example]))


def grpo_loss(new, old, reference, advantage, clip: float, kl: float):
    """(B, T): the clipped objective of each token, negated, plus kl times its divergence.

    new, old, reference (B, T): log-probabilities by the model that learns, by the one that drew the
    tokens, by the start; advantage (B, 1). The divergence is estimated by r - 1 - log r >= 0, where
    r is the ratio of the start's probability to the new one.
    """
    ratio, gap = (new - old).exp(), reference - new
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return kl * (gap.exp() - 1 - gap) - gain


def advantages(rewards: list[float]) -> list[float]:
    """How much better each of a group is than the group, in its standard deviations."""
    r = torch.tensor(rewards, dtype=torch.float64)
    return ((r - r.mean()) / (r.std(correction=0) + 1e-4)).tolist()


class GRPO(Task):
    """Group relative policy optimisation: completions that earn more than the mean of their group,
    which has the same prompt, become likelier."""

    def __init__(self, settings, run, tokenizer, model):
        super().__init__(settings, run, tokenizer, model)
        self.score, self.round, self.drawn, self.origin = code_reward, None, [], None
        self.silent = set(tokenizer.special_ids.values()) & self.stop   # end, and are no text
        if settings.reward:
            run.say(f"reward     EXECUTES {settings.reward}: it is your own code")
            self.score = load_reward(settings.reward)
        if not settings.data:                # there, a blank line ends a function, too
            self.stop |= {id for id in range(tokenizer.vocab_size)
                          if b"\n\n" in tokenizer.to_bytes([id])}

    def example(self, row: dict) -> dict | None:
        asked = conversation({"output": "", "completion": "", **row})
        while asked and asked[-1].get("role") == "assistant":           # what is to be drawn
            asked.pop()
        where = row.get("where", "a row")
        if not asked:
            raise ValueError(f"{where} has no prompt")
        ids = [id for part, _ in chat_parts(self.tokenizer, asked, where) for id in part]
        fits = len(ids) + 8 <= self.settings.context
        return {"rows": [(ids, ids)], "prompt": asked[-1]["content"]} if fits else None

    def begin(self, saved: dict) -> None:
        if self.settings.kl and not self.settings.lora:
            self.origin = copy.deepcopy(self.model).eval().requires_grad_(False)
            if saved:
                self.origin.load_state_dict(saved["origin"])
        if saved and self.run.world == 1:    # of several processes, each draws its round anew
            self.round, self.drawn = saved["round"], saved["drawn"]

    def kept(self) -> dict:
        origin = self.origin and self.origin.state_dict()
        return {"round": self.round, "drawn": self.drawn, "origin": origin}

    def batches(self):
        examples = super().batches()

        def of_step(step):
            if self.round != step // self.settings.updates:
                self.round = step // self.settings.updates
                self.drawn = self.rollouts(examples.chosen(self.round), step)
            return self.drawn
        return of_step

    def draw(self, prompts: list[dict], seed: int) -> list[dict]:
        """A group of completions of each prompt: their ids, text, reward and advantage."""
        size, made = self.settings.group, []
        asked = [prompt["rows"][0][0] for prompt in prompts for _ in range(size)]
        drawn = [[] for _ in asked]          # with the stop ids, which generate leaves out
        most = max(size, 8 * self.settings.micro_batch)                 # no gradients: more fit
        for first in range(0, len(asked), most):
            rows = drawn[first:first + most]
            self.net.generate(asked[first:first + most], self.settings.max_new_tokens,
                              temperature=self.settings.temperature, stop=self.stop,
                              seed=seed + first,
                              on_token=lambda row, id: rows[row].append(id))
        for prompt, group in zip(prompts, (drawn[i:i + size] for i in range(0, len(drawn), size))):
            texts = [self.tokenizer.to_bytes([id for id in ids if id not in self.silent], False)
                     .decode("utf-8", "replace") for ids in group]
            rewards = self.score(prompt["prompt"], texts, [ids[-1] in self.stop for ids in group])
            made += [{"prompt": prompt, "ids": ids, "text": content, "reward": r, "advantage": a}
                     for ids, content, r, a in zip(group, texts, rewards, advantages(rewards))]
        return made

    def means(self, made: list[dict]) -> dict:
        """Of completions drawn: reward, length, and which part no other of their group equals."""
        different = len({(id(m["prompt"]), m["text"]) for m in made})
        sums = self.run.sum(sum(m["reward"] for m in made), sum(len(m["ids"]) for m in made),
                            different, len(made))
        return {n: total / sums[3] for n, total in zip(("reward", "length", "distinct"), sums)}

    @torch.no_grad()
    def rollouts(self, prompts: list[dict], step: int) -> list[dict]:
        """Micro-batches of new completions, with their log-probabilities now and at the start."""
        temperature, made = self.settings.temperature, self.draw(prompts, seed=(
            self.settings.seed * 1_000_003 + step) * self.run.world + self.run.rank)
        means, examples, batches = self.means(made), [], []
        self.run.log(step=step + 1, **{f"drawn_{name}": value for name, value in means.items()})
        self.run.say("           drawn: " + train.shown(means))
        for m in made:
            prompt = m["prompt"]["rows"][0][0]
            row = ([*prompt, *m["ids"]][:-1], [-100] * (len(prompt) - 1) + m["ids"])
            examples.append({"rows": [row], "advantage": m["advantage"]})
        for _, batch in self.parts(examples):
            with self.run.autocast():
                batch["old"] = batch["reference"] = log_probs(self.net, batch, temperature)
                if self.settings.kl:
                    with without_adapters(self.origin or self.net) as start:
                        batch["reference"] = log_probs(start, batch, temperature)
            batches.append(batch)
        return batches

    def loss(self, net, batch):
        new, drawn = log_probs(net, batch, self.settings.temperature), batch["targets"] != -100
        losses = grpo_loss(new, batch["old"], batch["reference"], batch["advantage"][:, None],
                           self.settings.clip_ratio, self.settings.kl)
        return (losses * drawn).sum(), drawn.sum()

    def validate(self, net, last: bool) -> dict:
        """Measures of completions of held-out prompts, always the same ones with the same seed."""
        prompts = self.val[:max(1, self.settings.eval_examples // self.settings.group)]
        return self.means(self.draw(prompts[self.run.rank::self.run.world] or prompts[:1], seed=0))

    def sample(self, net) -> str:
        """Completions of held-out prompts, the first of each group."""
        made = self.draw(self.val[:self.settings.samples], seed=1) if self.settings.samples else []
        return "\n".join(f"--- reward {m['reward']:g} ---\n{m['prompt']['prompt']}{m['text']}"
                         for m in made[::self.settings.group])


def load_reward(path: str):
    """The rewards of a group, by reward(prompt, completion) of a Python file, which is executed."""
    try:
        reward = runpy.run_path(path)["reward"]
    except Exception as error:               # the user's code can raise anything
        raise ValueError(f"--reward {path}: {type(error).__name__}: {error}") from None

    def score(prompt, completions, ended):
        try:
            values = [float(reward(prompt, completion)) for completion in completions]
        except Exception as error:
            raise ValueError(f"--reward {path}: {type(error).__name__}: {error}") from None
        if not all(map(math.isfinite, values)):
            raise ValueError(f"--reward {path} gave {values}: rewards are finite numbers")
        return values
    return score


RECIPES = {  # task, examples in a step, epochs, learning rate relative to that of sft
    "sft": (SFT, 16, 3, 1.0), "classify": (Classify, 16, 4, 1.0), "dpo": (DPO, 16, 2, 0.3),
    "grpo": (GRPO, 8, 1, 1.0)}

# ------------------------------------------------------------------------------ loading and saving


def open_start(settings: Settings):
    """The model of a checkpoint, or of an adapter's folder: then its base, merged with it."""
    folder, values = Path(settings.init_from), {}
    if not (folder / "adapter_config.json").exists():
        if settings.config:
            config_class = train.model_parts(train.identify(folder))[1]
            values = train.config_values(config_class, settings.config)
        return train.load_checkpoint(folder, "cpu", torch.float32, **values)
    if settings.lora:
        raise ValueError(f"--lora: {folder} is an adapter itself: --merge it into its base first")
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    model = train.load_checkpoint(base, "cpu", torch.float32)
    load_adapter(folder, model)
    return merged(model)


def open_all(settings: Settings, resumed: dict | None):
    """(tokenizer, model on the CPU) of --init-from, or of the run that goes on."""
    if resumed:
        model_class, config_class, _ = train.model_parts(settings.model)
        return train.tokenizer_of(resumed), model_class(config_class(**resumed["config"]))
    model = open_start(settings)
    tokenizer = text.load_tokenizer(settings.tokenizer or settings.init_from)
    settings.model = next(name for name, (_, kind) in train.MODELS.items()
                          if kind == type(model).__name__)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"the model has {model.config.vocab_size} ids, the tokenizer "
                         f"{tokenizer.vocab_size}: it needs its own tokenizer")
    if tokenizer.end_id is None and not tokenizer.stop_ids:
        raise ValueError("the tokenizer has no id that ends a text: answers could not end")
    return tokenizer, model


def fill_defaults(settings: Settings, tokenizer, model) -> None:
    """Decide what was left open and does not need the data."""
    _, batch, epochs, rate = RECIPES[settings.task]
    settings.batch, settings.epochs = settings.batch or batch, settings.epochs or epochs
    most, narrow = model.config.context, 256 / width(model)
    if most and (settings.context or 0) > most:
        raise ValueError(f"--context {settings.context}: the model's is {most}")
    settings.context = settings.context or min(1024, most or 1024)
    settings.lora_alpha = settings.lora_alpha or 2.0 * (settings.lora or 1)
    # an adapter's learning rate need not fall as fast with the width
    settings.lr = settings.lr or 1e-3 * rate * (3 * narrow if settings.lora else narrow**2)
    if settings.chat is None:                # a model that completes text goes on doing so
        plain = settings.task == "grpo" and not (settings.data and tokenizer.chat_format)
        settings.chat = "none" if plain else tokenizer.chat_format or "alpaca"
    if settings.task != "classify":          # nothing is said there
        tokenizer.chat_format = None if settings.chat == "none" else settings.chat
        if settings.chat != "world":         # there, a blank line ends a reply
            stops = sorted({*train.eos_tokens(model.config), *ending(tokenizer)})
            model.config = dataclasses.replace(model.config, eos_token_id=stops)


def read_head(folder: Path) -> tuple[list[str], dict]:
    """(labels, tensors) of the head that --task classify left in a folder; ([], {}) without one."""
    if not (folder / "head.safetensors").exists():
        return [], {}
    from safetensors import safe_open
    with safe_open(folder / "head.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["labels"]), {n: file.get_tensor(n) for n in file.keys()}


def split(rows: list[dict], settings: Settings) -> tuple[list[dict], list[dict]]:
    """(to learn from, held out): the same part of every label."""
    piles, parts, dice = {}, ([], []), random.Random(settings.split_seed)
    for row in rows:
        pile = label_of(row) if settings.task == "classify" else ""
        piles.setdefault(pile, []).append(row)
    least = min(map(len, piles.values()), default=0) if settings.balance else None
    for _, pile in sorted(piles.items()):
        dice.shuffle(pile)
        pile = pile[:least]
        out = min(len(pile) - 1, max(1, round(settings.hold_out * len(pile))))
        out = 0 if settings.val else out
        parts[1].extend(pile[:out])
        parts[0].extend(pile[out:])
    for part in parts:
        dice.shuffle(part)
    return parts


def open_task(settings: Settings, run: train.Run, tokenizer, model, rows, resumed: dict | None):
    """The task, with its net on the device."""
    torch.manual_seed(settings.seed)         # adapters and heads are drawn
    if settings.lora:
        add_lora(model, settings)
    if settings.task == "classify":
        labels, head = read_head(Path(settings.init_from)) if not resumed else (
            resumed["task"]["labels"], {})
        if settings.predict and not head:
            raise ValueError(f"--predict: {settings.init_from} has no head yet: train one first")
        labels = labels or sorted({label_of(row) for row in rows})
        if len(labels) < 2:
            raise ValueError(f"two labels are needed, there is {', '.join(labels) or 'none'}")
        task = Classify(settings, run, tokenizer, model, labels)
        if head:
            task.net.head.load_state_dict(head)
    else:
        task = RECIPES[settings.task][0](settings, run, tokenizer, model)
    task.net.to(run.device).train(task.dropout)
    return task


def split_rows(settings: Settings, task: Task, rows: list[dict]) -> None:
    """Give the task its examples: to learn from, and to measure on."""
    learn, held = split(rows, settings)
    task.train = task.prepare(learn)
    task.val = task.prepare(read_rows(settings.val) if settings.val else held)
    for what, examples in (("learn from", task.train), ("measure on", task.val)):
        if not examples:
            raise ValueError(f"no examples to {what}: give more data")

# -------------------------------------------------------------------------------------------- main


def plan(settings: Settings, run: train.Run, task: Task) -> None:
    """Decide what depends on the data and the machine, and say what was decided."""
    if settings.batch < run.world:
        raise ValueError(f"--batch {settings.batch} leaves some of {run.world} processes idle")
    rows = settings.batch * {"dpo": 2, "grpo": settings.group}.get(settings.task, 1)
    known = sum(id != -100 for e in task.train for _, targets in e["rows"] for id in targets)
    settings.tokens_per_step = max(rows, round(rows * known / len(task.train)))     # about: a scale
    steps = settings.epochs * len(task.train) / settings.batch
    settings.steps = settings.steps or math.ceil(
        steps * (settings.updates if settings.task == "grpo" else 1))
    total, learn = (sum(p.numel() for p in task.net.parameters() if p.requires_grad or every)
                    for every in (True, False))
    source = ", ".join(settings.data) or "the source of Python's standard library"
    run.say(f"data       {source}: {len(task.train)} examples to learn from, {len(task.val)} held "
            "out")
    run.say(f"model      {settings.model}, {total:,} parameters, of which {learn:,} learn")
    held = total * (2 if settings.task == "grpo" and settings.kl and not settings.lora else 1)
    train.plan_memory(settings, run, type(task.model), task.config, rows, next_token_loss,
                      held, learn)
    run.say(f"plan       {settings.task}: {settings.steps} steps of {settings.batch} examples, "
            f"learning rate {settings.lr:.2g}" + (
                f", chat format {settings.chat}" if settings.task != "classify" else ""))


def write_merged(settings: Settings, run: train.Run, tokenizer, model) -> None:
    """--merge without --task: the plain checkpoint that an adapter makes of its base."""
    out = train.make_run_directory(settings)
    model.save_pretrained(out)
    tokenizer.save(out, model_max_length=model.config.context)
    for name in ("head.safetensors", "generation_config.json"):
        if Path(settings.init_from, name).exists():
            shutil.copy(Path(settings.init_from, name), out)
    run.say(f"run        {out}: the merged weights")


def settle(settings: Settings, given: set[str]) -> tuple[Settings, dict | None]:
    """(settings, what was saved if a run goes on), after a look at what was asked."""
    if settings.resume:
        out, harmless = Path(settings.resume), train.HARMLESS | {"samples", "eval_examples"}
        saved = train.load_resume(out)
        return train.resume_settings(Settings, saved["settings"], settings, given, out,
                                     harmless), saved
    if not (settings.init_from and (settings.task or settings.merge)):
        raise ValueError("give --task and --init-from CHECKPOINT (python train.py makes out/gpt)")
    for spec in dataclasses.fields(Settings):
        name, meaning = f"--{spec.name.replace('_', '-')}", spec.metadata["help"]
        if spec.name not in given:
            continue
        if meaning is HIDDEN:
            raise ValueError(f"{name} is a flag of train.py: here the checkpoint decides")
        if (only := meaning.split(":")[0]) in TASKS and only != settings.task:
            raise ValueError(f"{name} is a flag of --task {only}")
        if spec.name in ("lora_alpha", "lora_targets") and not settings.lora:
            raise ValueError(f"{name} needs --lora RANK")
    if settings.task == "grpo" and settings.data and not settings.reward:
        raise ValueError("--task grpo --data needs --reward FILE.py: a file that has "
                         "reward(prompt, completion)")
    settings.init_from = str(train.locate(settings.init_from))
    return settings, None


def finetune(settings: Settings, given: set[str]) -> None:
    """The script: model, data, plan, loop."""
    settings, resumed = settle(settings, given)
    with contextlib.redirect_stdout(sys.stderr if settings.predict else sys.stdout):
        run = train.start_run(settings)      # of a prediction only labels go to stdout
    tokenizer, model = open_all(settings, resumed)
    if not settings.task:
        return write_merged(settings, run, tokenizer, model)
    if not resumed:
        fill_defaults(settings, tokenizer, model)
    place = [settings.predict] if settings.predict else settings.data
    rows = read_rows(place) if place else DEFAULT_ROWS[settings.task]()
    task = open_task(settings, run, tokenizer, model, rows, resumed)
    if settings.predict:
        return task.predict(rows)
    split_rows(settings, task, rows)
    key = hashlib.blake2b(repr([[e["rows"] for e in part] for part in (task.train, task.val)])
                          .encode(), digest_size=8).hexdigest()
    if resumed and key != resumed["data"]:
        raise ValueError(f"--resume {settings.out}: the data have changed since it was started")
    plan(settings, run, task)
    task.begin(resumed["task"] if resumed else {})
    if settings.checkpoint_activations:      # after `begin`, which may copy the model
        train.checkpoint_blocks(task.model)
    if resumed:
        task.net.load_state_dict(resumed["model"])
    before = resumed["before"] if resumed else task.validate(task.net, True)
    run.say("before     " + train.shown(before))
    if settings.eval_only:
        return
    if not resumed:
        run.say(task.sample(task.net))
    train.fill_schedule(settings, run, task.net, None, task.loss)
    if run.rank == 0:
        named = dataclasses.replace(settings, model=f"{settings.model}-{settings.task}")
        run.out = Path(settings.out) if resumed else train.make_run_directory(named)
        settings.out = str(run.out)
        run.say(f"run        {run.out}")
        if not resumed:
            run.log(step=0, **before)

    def save(state):
        if run.rank == 0:
            train.save_resume({**state, "task": task.kept(), "before": before}, settings,
                              task.config, tokenizer, key, run.out)
            train.publish(task, tokenizer, settings, run.out)
    after = train.fit(settings, run, task.net, task.batches(), task.loss, validate=task.validate,
                      sample=task.sample, save=save, resumed=resumed)
    for name, value in after.items():
        run.say(f"{name:<10} {before[name]:.4f} -> {value:.4f}")
    use = f"python chat.py {settings.out}"
    if settings.task == "classify":
        use = f"python finetune.py --task classify --init-from {settings.out} --predict FILE"
    elif settings.lora and not settings.merge:
        use = f"python finetune.py --merge --init-from {settings.out} --out NEW"
    run.say(f"{train.clock(time.time() - train.STARTED)} in all, peak memory "
            f"{train.peak_bytes(run.device) / 2**30:.2f} GB. Use it:  {use}")


def main(argv: list[str] | None = None) -> None:
    """`python finetune.py`."""
    argv = sys.argv[1:] if argv is None else argv
    train.run_script("finetune.py", finetune,
                     *train.parse_settings(Settings, argv, __doc__.split("\n")[0]))


if __name__ == "__main__":
    main()
