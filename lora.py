"""LoRA: two small matrices beside each large one, and the files of such adapters as peft has them.

It works on any model of this project by replacing its linear layers. `add_lora` gives them
adapters, `merged` makes a plain model again.

Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""
import copy
import json
import math
import os
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from checkpoints import read_json, readable, write_text


class LoRALinear(nn.Module):
    """W x + scale B A x. W stays as it was; A (rank, in) and B (out, rank) learn, B from 0."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))           # as its authors, and peft

    def forward(self, x):
        return (F.linear(x, self.weight, self.bias)
                + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B))


def adapters(model) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, settings) -> None:
    """Give every linear layer that --lora-targets matches an adapter; only adapters learn.

    Not a tied head: its weight is the token table's.
    """
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and not any(module.weight is t for t in tables)}
    try:
        matched = [name for name in layers if re.search(settings.lora_targets, name)]
    except re.error as error:
        raise ValueError(f"--lora-targets {settings.lora_targets}: {error}") from None
    if not matched:
        raise ValueError(f"--lora-targets {settings.lora_targets} matches no linear layer of this "
                         f"model: it has {', '.join([*layers][:7])} ...")
    model.requires_grad_(False)
    for name in matched:
        scale = settings.lora_alpha / settings.lora
        model.set_submodule(name, LoRALinear(layers[name], settings.lora, scale))


@torch.no_grad()
def merged(model, strength: float = 1.0):
    """A plain model that computes the same as this one with adapters, or with strength 0 what it
    did without them. All else is shared with it. (Not its code: see train.checkpoint_blocks.)"""
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name, m in adapters(plain).items():
        linear = nn.Linear(*m.weight.shape[::-1], bias=False, device="meta")
        linear.weight, linear.bias = m.weight, m.bias
        if strength:
            linear.weight = nn.Parameter(m.weight + strength * m.scale * m.lora_B @ m.lora_A)
        plain.set_submodule(name, linear)
    return plain.eval()


def peft_prefix(model) -> str:
    """What peft has before our name of a layer; the rest is transformers' name."""
    return "base_model.model." + "transformer." * (type(model).__name__ == "GPT")


def save_adapter(model, settings, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft does."""
    from safetensors.torch import save_file
    prefix, file = peft_prefix(model), out / "adapter_model.safetensors"
    tensors = {f"{prefix}{name}.lora_{part}.weight": getattr(module, f"lora_{part}").detach()
               for name, module in adapters(model).items() for part in "AB"}
    save_file(tensors, f"{file}.part", {"format": "pt"})
    os.replace(f"{file}.part", file)
    write_text(out / "adapter_config.json", json.dumps({
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
    with readable(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
    for key in sorted(tensors):              # A before B
        name, _, part = key.removeprefix(prefix).rpartition(".lora_")
        module = dict(model.named_modules()).get(name)
        if part == "A.weight" and isinstance(module, nn.Linear):
            rank = len(tensors[key])
            scale = stated.get("lora_alpha", 8) / (  # peft's default
                math.sqrt(rank) if stated.get("use_rslora") else rank)
            module = LoRALinear(module, rank, scale)
            model.set_submodule(name, module)
        own = getattr(module, f"lora_{part[:1]}", None)
        if own is None or own.shape != tensors[key].shape:
            raise ValueError(f"{folder}: {key} {tuple(tensors[key].shape)} is no adapter of this "
                             f"{type(model).__name__}: was it made for another model?")
        own.data.copy_(tensors[key])
