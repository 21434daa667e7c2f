"""What a folder says of its model: where everything is, whether it converses, how it is sampled.

    place = Place(args)                     of a checkpoint, or of an adapter and its base
    tokenizer, source, why = place.load_tokenizer(args)
    inspect(args)                           `chat.py DIR --inspect`
"""
import contextlib
import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import tokenizer as text
from checkpoints import (MODELS, check_vocabulary, eos_tokens, identify, innermost,
                         load_checkpoint, read_json, read_pickle, readable)
from hub import locate
from lora import adapter_folder, adapters, find_base, load_adapter
from plan import free_bytes
from process import choose_device
from published import is_classifier

LIMITS = {"temperature": "0 (the likeliest token) or more", "top_k": "a whole number, at least 1",
          "top_p": "0 to 1"}


def possible(name: str, value) -> bool:
    """Whether a setting of the sampling is within its limits, wherever it was stated."""
    if name == "top_k":
        return type(value) is int and value >= 1
    high = 1 if name == "top_p" else sys.float_info.max     # not infinity
    return type(value) in (int, float) and 0 <= value <= high


class Place:
    """Where everything is that the command line names."""

    def __init__(self, args):
        path = locate(args.weights)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        self.adapter = adapter_folder(path)
        if args.base and not self.adapter:
            raise ValueError(f"--base is for adapters, and {path} is none")
        self.weights = find_base(self.adapter, args.base) if self.adapter else path
        folder = self.weights if self.weights.is_dir() else self.weights.parent
        self.folders = [self.adapter, folder] if self.adapter else [folder]     # the first wins
        self.classifier = None               # what to do with one
        if is_classifier(self.folders[0]):
            self.classifier = (f"{path} labels texts, it does not write any: python finetune.py "
                               f"--task classify --init-from {path} --predict FILE")

    def load_tokenizer(self, args):
        """(tokenizer with the chat format decided on, where it is from, why that format)."""
        own = self.adapter and any(any(self.adapter.glob(name)) for name in text.FILES)
        path = args.tokenizer or (self.adapter if own else self.weights)
        try:
            tokenizer = text.load_tokenizer(path)
        except (ValueError, OSError) as error:
            hint = "" if args.tokenizer else " (--tokenizer names another place)"
            raise ValueError(f"{error}{hint}") from None
        if own and "chat_format" not in tokenizer.config:   # an adapter's folder has no config.json
            with contextlib.suppress(ValueError, OSError):
                tokenizer.chat_format = text.load_tokenizer(self.weights).chat_format
        for folder in self.folders:
            chosen, why = choose_format(folder, tokenizer, args.chat)
            if chosen:
                break
        tokenizer.chat_format = chosen
        if args.system is not None and chosen is None:
            raise ValueError(f"--system is for conversations, and this model completes text: {why}")
        return tokenizer, path, why

    def sampling(self, args) -> tuple[dict, str]:
        """(temperature, top_k, top_p of `generate`; a note): the flags, then what is stated."""
        file = next((file for folder in self.folders
                     if (file := folder / "generation_config.json").exists()), Path())
        stated, chosen, note = text.read_json(file), {}, ""
        stated = {name: value for name, value in stated.items()
                  if value is not None and (name, value) != ("top_k", 0)}       # 0 there: all
        if type(stated.get("do_sample", False)) is not bool:
            raise ValueError(f"{file}: do_sample is {stated['do_sample']!r}: true or false")
        if stated.get("do_sample") is False and args.temperature is None:
            stated, note = {"temperature": 0.0}, " (do_sample is false in generation_config.json)"
        for name, default in (("temperature", 0.8), ("top_k", None), ("top_p", None)):
            chosen[name] = vars(args)[name]
            if chosen[name] is None:
                chosen[name] = stated.get(name, default)
                if name in stated and not possible(name, chosen[name]):
                    flag = f"--{name.replace('_', '-')}"
                    raise ValueError(f"{file}: {name} is {repr(chosen[name])[:40]}, it must be "
                                     f"{LIMITS[name]}; {flag} decides otherwise")
        return chosen, note


def stated_eos(*folders: Path) -> set[int]:
    """The ids that end a text by config.json and generation_config.json."""
    stated = [text.read_json(folder / name).get("eos_token_id") for folder in folders
              for name in ("config.json", "generation_config.json")]
    return {id for ids in stated for id in (ids if isinstance(ids, list) else [ids])
            if type(id) is int}


def choose_format(folder: Path, tokenizer, asked: str | None) -> tuple[str | None, str]:
    """(chat format or None, why): whether the model in this folder converses."""
    own, config = tokenizer.chat_format, tokenizer.config
    if asked:
        return None if asked == "none" else asked, f"--chat {asked}"
    if "chat_format" in config:
        return own, f"its tokenizer_config.json says chat_format {json.dumps(own)}"
    if tokenizer.chat_reason:                # it has a chat template: see templates.choose_format
        return own, tokenizer.chat_reason + ("" if own else "; --chat takes a known one")
    if own and len(stated_eos(folder)) > 1:
        return own, "its configs name several ids that end a text"
    if own and (folder / "params.json").exists():
        return None, ("Meta's folders do not tell base models from Instruct; if this is one, add "
                      f"--chat {own}")
    if own in ("world", "chatglm3"):
        return own, "as nearly all models of this vocabulary do; if not this one, --chat none"
    return None, "neither chat_format, nor chat template, nor several eos ids in its folder"


def told_sampling(sampling: dict, note: str) -> str:
    return ", ".join(f"{k} {v}" for k, v in sampling.items() if v is not None) + note


def told_format(chosen: str | None, why: str) -> str:
    return f"converses  in the format {chosen}: {why}" if chosen else f"completes  text: {why}"


# ----------------------------------------------------- --inspect: what is there, without loading it


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights of a checkpoint, in whichever layout."""
    if path.is_file() and path.suffix != ".pth":
        return [path]
    for index in sorted(path.glob("*.index.json")):
        return sorted({path / name for name in read_json(index)["weight_map"].values()})
    found = importlib.import_module("llama3").meta_shards(path)
    kinds = ("ckpt.pt", "model.safetensors", "pytorch_model.bin", "*.pth")
    found = found or next(filter(None, (sorted(path.glob(kind)) for kind in kinds)), [])
    return [path] if path.is_file() and path not in found else found


def stored_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file of weights, mapped into memory."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file
        return load_file(file)
    return {name: tensor for name, tensor in innermost(read_pickle(file)).items()
            if isinstance(tensor, torch.Tensor)}


class Shapes(TorchFunctionMode):
    """On the meta device, where tensors have no data, torch.equal says what is known of them."""

    def __init__(self, equal: bool):
        super().__init__()
        self.equal = equal

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.equal if func is torch.equal else func(*args, **(kwargs or {}))


def load_shapes(path: Path, stored: dict):
    """The model of a checkpoint on the meta device, with every check of names and shapes that
    loading makes. Of `stored`, its mapped tensors, a few rows are read: is the head the table?"""
    def find(names):
        return next((tensor for name, tensor in stored.items()
                     if re.search(rf"(^|\.)({names})\.weight$", name)), None)
    head = find("lm_head|output|output_layer")
    table = find("wte|tok_embeddings|embed_tokens|word_embeddings")
    tied = head is None or table is not None and torch.equal(head[::997].to(table), table[::997])
    module = importlib.import_module(MODELS[identify(path)][0])
    read = getattr(module, "read_tensors", None)            # RWKV files compute nothing of tensors
    try:
        if read:
            module.read_tensors = lambda file: (
                (name, tensor.to("meta")) for name, tensor in read(file))
        with Shapes(equal=tied):
            return load_checkpoint(path, "meta")
    finally:
        if read:
            module.read_tensors = read


def describe(path: Path, tell):
    """tell(label, text): what a checkpoint is and why, what it holds, what it needs. Where
    `load_checkpoint` would raise, it raises the same; else returns the model, of meta tensors."""
    with readable(path):
        module, class_name = MODELS[identify(path)]
        folder = path if path.is_dir() else path.parent
        stated = {} if path.suffix in (".pt", ".pth") else read_json(folder / "config.json")
        why = (f"config.json has model_type {stated['model_type']!r}" if "model_type" in stated else
               {"gpt": "a .pt is nanoGPT's layout", "llama3": "params.json and consolidated.NN.pth "
                "are Meta's layout"}.get(module, "so its tensors are named and shaped"))
        tell("model", f"{class_name} of {module.replace('.', '/')}.py: {why}")
        files, stored, count, kinds = weight_files(path), {}, 0, Counter()
        size = sum(file.stat().st_size for file in files)
        names = [file.relative_to(folder).as_posix() for file in files]
        if files:                            # else loading says what is missing
            tell("weights", f"{gb(size)} in {plural(len(files), 'file')}: {', '.join(names[:3])}"
                 + (", ..." if names[3:] else ""))
        for file in files:
            stored |= (new := stored_tensors(file))
            count += len(new)
            for tensor in new.values():
                if tensor.is_floating_point() or tensor.dtype == torch.int8:      # no masks
                    kinds[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    shares = [f"{kind} ({n / kinds.total():.1%} of the numbers)" for kind, n in kinds.most_common()]
    told = ", ".join([plural(count, "tensor"), *(shares if shares[1:] else kinds)])
    if files:
        tell("stored as", told)
    model = load_shapes(path, stored)
    weights, context = list(model.parameters()), model.config.context
    tell("sizes", f"{sum(p.numel() for p in weights):,} parameters: {model.config}")
    state = sum(tensor.nbytes for tensor in model.new_state(1, context or 1))
    length = f"{context:,} tokens (the context)" if context else "any length"
    tell("memory", f"{gb(sum(p.nbytes for p in weights))} for the weights, {gb(state)} for the "
         f"past, of {length}")
    return model


def gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.3f} MB"


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def inspect(args) -> int:
    """--inspect: what the command line names and how it would be used, without loading it.

    The exit status: 2 if anything would not load, which then has a line that says why.
    """
    place, device, model, status = Place(args), choose_device(args.device), None, 0
    if place.classifier:
        print(f"classifier {place.classifier}")

    def tell(label, what):
        print(f"{label:10} {what}")

    @contextlib.contextmanager
    def attempt(label):
        nonlocal status
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            tell(label, f"would not load: {error}")
            status = 2
    with attempt("model"):
        model = describe(place.weights, tell)
        free = free_bytes(device)
        tell("device", device.type + (f", {gb(free)} are free" if free else ""))
    if model and place.adapter:
        with attempt("adapter"):
            load_adapter(place.adapter, model)
            ranks = sorted({len(layer.lora_A) for layer in adapters(model).values()})
            tell("adapter", f"LoRA of rank {', '.join(map(str, ranks)) or 0} on "
                 f"{plural(len(adapters(model)), 'layer')}, to be merged with {place.weights}")
    with attempt("tokenizer"):
        tokenizer, path, why = place.load_tokenizer(args)
        tell("tokenizer", f"{type(tokenizer).__name__}, {tokenizer.vocab_size:,} tokens: {path}")
        print(told_format(tokenizer.chat_format, why))
        stops = {*tokenizer.stop_ids, *stated_eos(*place.folders)}
        if model:
            stops |= {*eos_tokens(model.config)}
            check_vocabulary(model.config, tokenizer)
        told = [f"{id} {tokenizer.decode([id])!r}" for id in sorted(stops)]
        more = f" and {len(told) - 8} more" if told[8:] else ""
        tell("stops at", ", ".join(told[:8]) + more)
    with attempt("sampling"):
        tell("sampling", told_sampling(*place.sampling(args)))
    return status
