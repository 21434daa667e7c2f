"""LoRA: two small matrices beside each large one, and the files of such adapters as peft has them.

It works on any model of this project by replacing its linear layers. `add_lora` gives them
adapters, `merged` makes a plain model again. `load_adapter` reads what peft wrote for the same
model in transformers, `load_merged` with its base.

Reference: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""
import collections
import copy
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import glm4
from checkpoints import load_checkpoint, read_json, read_pickle, readable, write_text
from hub import is_name, locate
from published import hub_name
from tokenizer import replacing

PREFIX = "base_model.model."                 # of peft: its names of tensors begin so


class LoRALinear(nn.Module):
    """W x + scale B A x. W stays as it was; A (rank, in) and B (out, rank) learn, B from 0, in fp32
    at least. bits: "int8" or "int4", in which W is then kept (practice/fast.py)."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, bits: str | None = None):
        super().__init__()
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        like = dict(device=self.weight.device,
                    dtype=torch.promote_types(self.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))           # as its authors, and peft
        self.frozen = None
        if bits:
            from practice.fast import KINDS
            self.frozen, self.weight = KINDS[bits]["plain"](linear), None

    def forward(self, x):
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if self.frozen is not None:          # its weights as numbers again, now and going back
            y = checkpoint(self.frozen, x, use_reentrant=False)
        else:
            y = F.linear(x, self.weight, self.bias)
        return y + self.scale * F.linear(F.linear(x, A), B)


def adapters(model) -> dict[str, LoRALinear]:
    """The layers that have an adapter, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, settings, bits: str | None = None) -> None:
    """Give every linear layer that --lora-targets matches an adapter; only adapters learn.

    Not a tied head: its weight is the token table's. bits: see `LoRALinear`.
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
        model.set_submodule(name, LoRALinear(layers[name], settings.lora, scale, bits))


@torch.no_grad()
def merged(model, strength: float = 1.0):
    """A plain model that computes the same as this one with adapters, or with strength 0 what it
    did without them. All else is shared with it. (Not its code: see train.checkpoint_blocks.)

    W + scale B A is added up in fp32, and rounded once where W is half as precise.
    """
    plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name, m in adapters(plain).items():
        linear = nn.Linear(*m.weight.shape[::-1], bias=False, device="meta")
        linear.weight, linear.bias = m.weight, m.bias
        if strength:
            change = strength * m.scale * m.lora_B.float() @ m.lora_A.float()
            linear.weight = nn.Parameter((m.weight + change).to(m.weight.dtype))
        plain.set_submodule(name, linear)
    if getattr(plain.config, "tie_word_embeddings", False):
        tables = [module.weight for module in plain.modules() if isinstance(module, nn.Embedding)]
        tied = any(plain.lm_head.weight is table for table in tables)   # not if one was adapted
        plain.config = dataclasses.replace(plain.config, tie_word_embeddings=tied)
    return plain.eval()

# ---------------------------------------------------------------------------------- files, as peft


def peft_name(model, name: str) -> str:
    """What transformers, and so peft, calls a layer of ours."""
    inside = type(model).__name__ == "GPT" and name != "lm_head"
    return "transformer." * inside + name


def save_adapter(model, settings, out: Path, home: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, as peft does, into `out`; home: the
    folder that they will be moved to."""
    from safetensors.torch import save
    names = {name: peft_name(model, name) for name in adapters(model)}
    tensors = {f"{PREFIX}{names[name]}.lora_{half}.weight": getattr(module, f"lora_{half}").detach()
               for name, module in adapters(model).items() for half in "AB"}
    with replacing(out / "adapter_model.safetensors") as file:
        file.write(save(tensors, {"format": "pt"}))
    write_text(out / "adapter_config.json", json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": name_base(settings.init_from, home or out),
        "r": settings.lora, "lora_alpha": settings.lora_alpha, "lora_dropout": 0.0,
        "fan_in_fan_out": type(model).__name__ == "GPT",                # transformers' Conv1D
        "target_modules": [*names.values()]}, indent=2) + "\n")


def name_base(base: str, out: str | Path) -> str:
    """How an adapter in the folder `out` names its base: from there, so that both may move; a
    download of huggingface_hub by its repository."""
    try:
        places = os.path.realpath(base), os.path.realpath(out)
        return hub_name(base) or Path(os.path.relpath(*places)).as_posix()
    except ValueError:                       # on another drive of Windows
        return str(Path(base).resolve())


# Fields of adapter_config.json that are read here, or do not change what a trained adapter
# computes. Any other that is not empty or false, of this or a later peft, is refused by name.
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save",
        "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "fan_in_fan_out", "lora_dropout", "auto_mapping", "task_type", "revision",
        "inference_mode", "peft_version", "megatron_core", "runtime_config", "eva_config",
        "qalora_group_size", "ensure_weight_tying"}
VALUES = {"peft_type": ["LORA"], "bias": ["none"],                      # others change the base too
          "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}
ADVICE = "peft's merge_and_unload and save_pretrained make plain weights of it"


def adapter_folder(path: Path) -> Path | None:
    """The folder of an adapter, by its path or that of a file in it; None: it is a checkpoint."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "adapter_config.json").exists():
        return None
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            whole = [file for file in (folder / name, folder / f"{name}.index.json")
                     if file.exists()]
            if whole:
                raise ValueError(f"{folder} holds an adapter and a model: give the path of one, "
                                 f"{folder / 'adapter_config.json'} or {whole[0]}")
    return folder if path.is_dir() or path.name.startswith("adapter_") else None


def find_base(folder: Path, asked: str | None = None) -> Path:
    """Where the model is that an adapter belongs to: as asked, or as its config says, which may be
    said from its own folder."""
    stated = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    try:
        beside = (folder / str(stated)).resolve()
        base = beside if not asked and stated and beside.exists() else locate(
            str(asked or stated), download=bool(asked))
    except (OSError, ValueError):            # a repository that cannot be had
        if asked:
            raise
        base = None
    if not (base and base.exists()):
        raise FileNotFoundError(
            f"--base {asked} does not exist" if asked else
            f"{folder} is an adapter of {stated}, which is not there: --base DIR names the place "
            "where it is now" + (f", --base {stated} downloads it" if is_name(stated) else "")
            if stated else
            f"{folder} is an adapter that does not say of what: --base DIR names its base")
    if adapter_folder(base):
        raise ValueError(f"{folder} is an adapter of {base}, which is one itself: merge that, "
                         f"python finetune.py --merge --init-from {base} --out NEW, and --base NEW")
    return base


def load_merged(folder: Path, base: Path, device: str = "cpu", dtype=None):
    """The plain model that an adapter makes of its base. Merged before it goes to the device,
    which then has one copy."""
    model = load_checkpoint(base, "cpu", dtype)
    load_adapter(folder, model)
    return merged(model).to(device)


def load_adapter(folder: Path, model) -> None:
    """Put the adapters of a folder in peft's layout into the model they were made for, and the
    whole modules that it has (modules_to_save) in place of the model's."""
    with readable(folder):
        halves, whole = read_adapter(folder, model)
        layers, parameters = dict(model.named_modules()), all_parameters(model)
        for name, tensor in whole.items():   # a tied table or head that is replaced stands alone
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(parameters[name])))
        for name, found in halves.items():
            if "A" not in found or "B" not in found:
                raise ValueError(f"{folder}: {name} has only one of lora_A and lora_B")
            module = LoRALinear(layers[name], len(found["A"]), found["scale"])
            for half in "AB":
                own = getattr(module, f"lora_{half}")
                if own.shape != found[half].shape:
                    raise foreign(folder, model, f"lora_{half} of {name}", found[half])
                dtype = torch.promote_types(own.dtype, torch.float32)   # precise until it is merged
                setattr(module, f"lora_{half}", nn.Parameter(found[half].to(own.device, dtype)))
            model.set_submodule(name, module)


def read_adapter(folder: Path, model) -> tuple[dict[str, dict], dict]:
    """({layer: {"A", "B", "scale"}}, {parameter: tensor}) of a folder, by our names."""
    stated = read_json(folder / "adapter_config.json")
    for name, value in stated.items():
        if value and (value not in VALUES[name] if name in VALUES else name not in READ):
            raise ValueError(f"{folder}: {name} is {value!r}, which is not supported; {ADVICE}")
    file = folder / "adapter_model.safetensors"
    if file.exists():
        from safetensors.torch import load_file
        tensors = load_file(file)
    else:
        tensors = read_pickle(file.with_suffix(".bin"))
    layers, parameters = dict(model.named_modules()), all_parameters(model)
    halves, whole = collections.defaultdict(dict), {}
    for key, tensor in tensors.items():
        place, half = re.fullmatch(r"(.+?)(?:\.lora_([AB])\.(?:default\.)?weight)?",
                                   key.removeprefix(PREFIX).replace(".base_layer.", ".")).groups()
        if ".lora_" in place or "token_adapter" in place:
            raise ValueError(f"{folder}: {key} is of a kind that is not supported; {ADVICE}")
        for ours, part in to_ours(model, place, tensor, half):
            if half and isinstance(layers.get(ours), nn.Linear):
                rank = len(tensor) if half == "A" else tensor.shape[1]
                halves[ours] |= {half: part, "scale": scale_of(stated, place, rank)}
            elif not half and ours in parameters and parameters[ours].shape == part.shape:
                whole[ours] = part
            else:
                raise foreign(folder, model, key, tensor)
    if not halves and not whole:
        raise ValueError(f"{folder} holds no adapter: its file of tensors is empty")
    return halves, whole


def all_parameters(model) -> dict[str, nn.Parameter]:
    """By every name that it has: a tied one has two."""
    return dict(model.named_parameters(remove_duplicate=False))


def foreign(folder: Path, model, name: str, tensor) -> ValueError:
    return ValueError(f"{folder}: {name} {tuple(tensor.shape)} is no adapter of this "
                      f"{type(model).__name__}: was it made for another model, or one whose "
                      "vocabulary was resized?")


def scale_of(stated: dict, layer: str, rank: int) -> float:
    """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA); both may be stated
    for layers whose names end in a pattern."""
    alpha, r = (next((value for pattern, value in (stated.get(patterns) or {}).items()
                      if re.match(rf"(.*\.)?({pattern})$", layer)), stated.get(name) or 8)
                for patterns, name in (("alpha_pattern", "lora_alpha"), ("rank_pattern", "r")))
    if r != rank:
        raise ValueError(f"{layer} is of rank {rank}, but the adapter's config says {r}")
    return alpha / (math.sqrt(rank) if stated.get("use_rslora") else rank)


def to_ours(model, name: str, tensor, half: str | None):
    """Yield (our name, our tensor) of transformers' or a remote code's; half: "A" or "B", of the
    layer `name`; None: the whole parameter `name`."""
    if type(model).__name__ == "GLM4":       # query_key_value: q, k and v share A, and divide B
        name = re.sub(r"^(model|transformer)\.", "", name)              # as read_tensors does
        for ours, part in glm4.to_ours([(name, tensor)], model.config):
            yield ours, tensor if half == "A" else part
    elif type(model).__name__ == "GPT":
        name = name.removeprefix("transformer.")
        conv1d = not half and name.startswith("h.") and tensor.dim() == 2       # (in, out)
        yield name, tensor.t() if conv1d else tensor
    else:
        yield name, tensor
