"""A recurrent language model as small as the contract allows: what scripts and shared blocks must serve.

    memory = decay * memory + W x;  x = x + U memory;  logits = V x

Its state has no limit, its optimiser settings are unusual, and its loss has the L2Wrap of RWKV.
"""
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import gpt


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = 64
    width: int = 16
    layers: int = 2
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    context = None

    @classmethod
    def sized(cls, layers, width, vocab_size, context):
        return cls(vocab_size, width, layers)


class State(NamedTuple):
    position: Tensor                         # (B,) int64
    memory: Tensor                           # (B, L, C) fp32
    capacity = math.inf


class Toy(nn.Module):
    OPTIMIZER = dict(betas=(0.8, 0.9), eps=1e-6)
    L2WRAP = 1e-4
    generate, read_prompts = gpt.GPT.generate, gpt.GPT.read_prompts

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.inward = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))
        self.outward = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))
        self.decay = nn.Parameter((torch.arange(config.width) * 4 / config.width - 2).repeat(config.layers, 1))
        self.head = nn.Linear(config.width, config.vocab_size)

    def new_state(self, batch_size, max_tokens):
        like = self.emb.weight
        return State(like.new_zeros(batch_size, dtype=torch.int64),
                     like.new_zeros(batch_size, self.config.layers, self.config.width).float().detach())

    def hidden(self, tokens, state=None):
        scratch = state or self.new_state(*tokens.shape)
        x = self.emb(tokens)                                            # (B, T, C)
        for i, (inward, outward) in enumerate(zip(self.inward, self.outward)):
            memory, past = scratch.memory[:, i].clone(), []             # (B, C)
            for step in inward(x).unbind(1):
                memory = torch.sigmoid(self.decay[i]) * memory + step
                past.append(memory)
            scratch.memory[:, i] = memory.detach()
            x = x + outward(torch.stack(past, 1).tanh())
        scratch.position.add_(tokens.shape[1])
        return x

    def logits(self, hidden):
        return self.head(hidden)

    def forward(self, tokens, state=None, last=False):
        hidden = self.hidden(tokens, state)
        return self.head(hidden[:, -1:] if last else hidden)

    def parameter_groups(self, weight_decay):
        return [dict(params=[p for n, p in self.named_parameters() if n != "decay"],
                     weight_decay=weight_decay, lr_scale=1.0, hidden_matrix=False),
                dict(params=[self.decay], weight_decay=0.0, lr_scale=2.0, hidden_matrix=False)]

    def save_pretrained(self, directory):
        Path(directory).mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), Path(directory, "model.pth.part"))
        os.replace(Path(directory, "model.pth.part"), Path(directory, "model.pth"))
        Path(directory, "config.json").write_text(json.dumps({"model_type": "toy", **asdict(self.config)}))

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None, **overrides):
        stated = json.loads((Path(path) / "config.json").read_text())
        stated.pop("model_type")
        model = cls(replace(ToyConfig(**stated), **overrides))
        model.load_state_dict(torch.load(Path(path) / "model.pth"), strict=True)
        return model.to(device, dtype).eval()


SIZES = {"tiny": ToyConfig()}
