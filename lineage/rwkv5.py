"""RWKV-5 in one file: build it, train it, load the published weights, generate.

A stack of blocks that read one residual stream and add to it:

    x = ln0(emb[token])
    each block:  x += time_mix(ln1(x));  x += channel_mix(ln2(x))
    logits = head(ln_out(x))

It is trained in parallel like a Transformer and runs as an RNN. What changed from RWKV-4, and why:

* a state of matrices: each head sums up its past in S, keys by values, which token t reads by r_t,
  its query: y_t = r_t (S + u k_t v_t);  S <- w S + k_t v_t. So a layer remembers D times as many
  numbers, and what is read from them depends on the token;
* nothing is divided by a sum of weights, so k needs no exponential and can be negative, and no
  maximum has to be kept; what comes out of a head is normed instead (ln_x);
* r is not squeezed by a sigmoid: the output has a gate of its own, silu(g) (from 5.1 on);
* to pay for the gate, the MLP is 3.5 times as wide, not four (from 5.1 on);
* decay and bonus are one number per head (5.0, 5.1), then one per channel of the key (5.2).

    B batch   T time   C channels (n_embd)   H heads   D head size   L layers   V vocabulary
    n blocks of h tokens each, where a sequence is computed in parallel

References: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic
Recurrence"; BlinkDL/RWKV-LM@524481d RWKV-v5/src/model.py (x052); BlinkDL/ChatRWKV@965e40b
RWKV_v5_demo.py. On chunks: Yang et al. 2023, "Gated Linear Attention Transformers".

Loads and writes the official .pth of RWKV-5.0, 5.1 and 5.2, a folder or the file alone; which it is
and its sizes are read from it. (What rwkv.cpp calls v5.1 is 5.0 here and in the rwkv package.)

    model = RWKV5.from_pretrained("RWKV-5-World-0.4B-v2.pth")   # or RWKV5(SIZES["0.4b"]), untrained
    logits = model(torch.tensor([[6699, 304]]))                 # (B, T) ids -> (B, T, V)
    [new] = model.generate([[6699, 304]], 20, temperature=0.8, top_p=0.5, seed=1)
    model.save_pretrained("copy")                               # the rwkv package opens it
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 64                                   # tokens whose weights on each other are one matrix


@dataclass(frozen=True)
class RWKV5Config:
    """Sizes of an RWKV-5. Its checkpoints state none: they are read from the tensors' shapes."""
    vocab_size: int = 65536
    n_embd: int = 1024
    n_layer: int = 24
    head_size: int = 64
    dim_ffn: int = 3584
    version: str = "5.2"                     # or 5.0, 5.1: see the first screen
    group_norm_eps: float = 64e-5            # 1e-5 * head_size_divisor ** 2, which is 8
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "n_embd", "n_layer", "head_size", "dim_ffn"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        if type(self.group_norm_eps) not in (int, float) or not 0 <= self.group_norm_eps < 1:
            raise ValueError(f"group_norm_eps must be in [0, 1), not {self.group_norm_eps!r}")
        if self.n_embd % self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of head_size {self.head_size}")
        if self.version not in ("5.0", "5.1", "5.2"):
            raise ValueError(f"version must be '5.0', '5.1' or '5.2', not {self.version!r}")

    @property
    def context(self) -> None:
        """The most ids that the model can see: no limit."""
        return None

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "RWKV5Config":
        """RWKV-5.2 of this depth and width: heads of 64 channels, an MLP 3.5 times as wide.

        Fewer channels where 64 does not divide the width. The context is no size of this model.
        """
        head = max(size for size in range(1, 65) if width % size == 0)
        return cls(vocab_size, width, layers, head, max(32, int(3.5 * width) // 32 * 32))


WORLD = dict(eos_ids=(0,))
SIZES = {
    "0.1b": RWKV5Config(65536, 768, 12, 64, 3072, "5.0", **WORLD),              # 192,780,576
    "0.4b": RWKV5Config(**WORLD),                                               # 461,721,600
    "1.5b": RWKV5Config(65536, 2048, 24, 64, 7168, **WORLD),                    # 1,577,754,624
    "3b": RWKV5Config(65536, 2560, 32, 64, 8960, **WORLD),                      # 3,062,999,040
    "7b": RWKV5Config(65536, 4096, 32, 64, 14336, **WORLD),                     # 7,518,044,160
}


@dataclass
class State:
    """What a batch remembers: for every layer, two vectors and one matrix per head, in fp32."""
    position: Tensor                         # (B,) int64: how many ids each row has seen
    att_x: Tensor                            # (B, L, C): the last input of time mixing
    ffn_x: Tensor                            # (B, L, C): the last input of channel mixing
    wkv: Tensor                              # (B, L, H, D, D): S, key by value

    @property
    def max_tokens(self) -> int | None:
        """The most ids it can hold; None where there is no limit."""
        return None

    # --- state: the same in every model file (tests/test_same.py) ---
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; each has the batch as its first axis."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def rows(self, start: int, stop: int) -> "State":
        """A view of some rows: writing to it writes to this state."""
        return type(self)(**{name: tensor[start:stop] for name, tensor in self.tensors().items()})

    def clone(self) -> "State":
        """A copy that shares nothing: clone before you branch."""
        return type(self)(**{name: tensor.clone() for name, tensor in self.tensors().items()})

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, replaced as a whole; OSError if that fails."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file
        try:
            save_file({name: t.contiguous() for name, t in self.tensors().items()}, f"{path}.part")
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None
        os.replace(f"{path}.part", path)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "State":
        """Read what `save` wrote; ValueError or OSError if the file is anything else."""
        tensors = {name: tensor.to(device, copy=True) for name, tensor in read_tensors(path)}
        if set(tensors) != {field.name for field in fields(cls)}:
            raise ValueError(f"{path} is no state of this model: it holds {', '.join(tensors)}")
        return cls(**tensors)
    # --- end of state ---


def previous(x: Tensor, last: Tensor | None) -> Tensor:
    """(B, T, C) -> (B, T, C): at each position the vector of the one before it.

    The first reads `last` (B, C), which becomes the newest, or zeros. What was there is data: under
    autograd, gradients reach x and nothing before it.
    """
    if last is None:
        return F.pad(x, (0, 0, 1, -1))
    shifted = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    last.copy_(x[:, -1].detach())
    return shifted


def wkv5(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor,
         S0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence, as matrix products; for each head and position t, from S0 on:

        y_t = r_t (S + (u k_t)ᵀ v_t);   S <- exp(w)ᵀ S + k_tᵀ v_t

    r, k, v: (B, H, T, D); w <= 0, the log of the decay, and u, bonus of the current token: (H, D)
    or (H, 1); S0: (B, H, D, D), key by value. Returns y: (B, H, T, D) and the last S. In fp32 (or
    fp64), as all official kernels compute it: in bf16, what a state of long memory adds up would
    be lost.
    """
    dtype = torch.promote_types(r.dtype, torch.float32)
    r, k, v, w, u, S = (x.to(dtype) for x in (r, k, v, w, u, S0))
    device = r.device.type                   # "meta" has no autocast to turn off
    with (torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device)
          else contextlib.nullcontext()):
        if r.shape[2] > 1:
            return wkv5_chunks(r, k, v, w, u, S)
        new = k.mT @ v                                                  # (B, H, D, D)
        return r @ (S + u[..., None] * new), w.exp()[..., None] * S + new


def wkv5_chunks(r, k, v, w, u, S):
    """`wkv5` for any T. Tokens of one chunk read each other by a matrix A, the rest through S.

    A is made by doubling: of two neighbouring blocks, a token of the later reads one of the earlier
    across their border, and the decay between them is that from the earlier token to the border
    times that from the border to the later one. So r carries the decay since its block began, k
    that until its block ends. All are products of numbers <= 1, never quotients: no decay is too
    strong for it. (The decays divided out, as r exp(sum w) times k exp(-sum w), overflow.)
    """
    T = r.shape[2]
    size = min(CHUNK, 1 << T.bit_length() - 1)
    if T % size:                             # zeros at the end would decay S: so smaller chunks
        y0, S = wkv5_chunks(*(x[:, :, :T - T % size] for x in (r, k, v)), w, u, S)
        y1, S = wkv5_chunks(*(x[:, :, T - T % size:] for x in (r, k, v)), w, u, S)
        return torch.cat([y0, y1], 2), S
    A = (r * u[:, None] * k).sum(-1)[..., None, None]                   # (B, H, n, h, h), h = 1
    r, k, w = r[..., None, :], k[..., None, :], w[:, None, None]        # (B, H, n, h, D)
    while A.shape[-1] < size:
        (A0, A1), (r0, r1), (k0, k1) = (
            (x[:, :, ::2], x[:, :, 1::2]) for x in (A, r, k))           # the earlier and the later
        decay = (A.shape[-1] * w).exp()                                 # of a block, (H, 1, 1, D)
        A = torch.cat([F.pad(A0, (0, A.shape[-1])), torch.cat([r1 @ k0.mT, A1], -1)], -2)
        r, k = torch.cat([r0, decay * r1], -2), torch.cat([decay * k0, k1], -2)
    v = v.unflatten(2, (-1, size))                                      # (B, H, n, h, D)
    before, kept = [], (size * w[:, 0]).exp().mT                        # S as each chunk begins
    for new in (k.mT @ v).unbind(2):                                    # (B, H, D, D)
        before.append(S)
        S = kept * S + new
    y = A @ v + r @ torch.stack(before, 2)                              # (B, H, n, h, D)
    return y.flatten(2, 3), S


class TimeMix(nn.Module):
    """What attention is elsewhere: tokens read the past, here summed up in one matrix per head."""

    def __init__(self, config: RWKV5Config):
        super().__init__()
        C, H, D = config.n_embd, config.n_head, config.head_size
        per_head = (H, D) if config.version == "5.2" else (H,)
        self.heads, self.head_size, self.eps = H, D, config.group_norm_eps
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))            # mix: the share of this
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))            # token in what each matrix
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))            # reads
        self.time_decay = nn.Parameter(torch.empty(per_head))           # log(-w)
        if config.version == "5.0":
            self.time_first = nn.Parameter(torch.empty(per_head))       # log(u)
        else:
            self.time_faaaa = nn.Parameter(torch.empty(per_head))       # u: bonus of the newest
            self.time_mix_g = nn.Parameter(torch.empty(1, 1, C))
            self.gate = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, config.group_norm_eps)

    def first_state(self, batch_size: int) -> Tensor:
        """S before the first token, (B, H, D, D) fp32: zeros."""
        shape = (batch_size, self.heads, self.head_size, self.head_size)
        return self.time_decay.new_zeros(shape, dtype=torch.float32)

    def blends(self, x, last):
        """What k, v, r (and g) read, (B, T, C) each: blends of x and its predecessor."""
        gap = previous(x, last) - x
        return [x + gap * (1 - getattr(self, f"time_mix_{name}"))
                for name in ("kvrg" if hasattr(self, "gate") else "kvr")]

    def forward(self, x, last, S):
        xk, xv, xr, *xg = self.blends(x, last)
        w = -torch.exp(self.time_decay.float())                 # bf16 cannot tell 0.999 from 1
        u = self.time_faaaa if xg else self.time_first.float().exp()
        w, u = w.view(self.heads, -1), u.view(self.heads, -1)           # (H, D) or (H, 1)
        r, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2)     # (B, H, T, D)
                   for z in (self.receptance(xr), self.key(xk), self.value(xv)))
        S0 = self.first_state(len(x)) if S is None else S.clone() if torch.is_grad_enabled() else S
        y, end = wkv5(r, k, v, w, u, S0)
        if S is not None:
            S.copy_(end.detach())
        y = F.layer_norm(y, (self.head_size,), eps=self.eps).transpose(1, 2).flatten(2)
        y = y * self.ln_x.weight.float() + self.ln_x.bias.float()       # a group norm, in y's fp32
        y = y.to(v.dtype)
        return self.output(y * F.silu(self.gate(*xg)) if xg else y)


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between them, behind a gate."""

    def __init__(self, config: RWKV5Config):
        super().__init__()
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, config.n_embd))    # shares of this
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, config.n_embd))    # token
        self.key = nn.Linear(config.n_embd, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.dim_ffn, config.n_embd, bias=False)

    def forward(self, x, last):
        gap = previous(x, last) - x
        k = F.relu(self.key(x + gap * (1 - self.time_mix_k))) ** 2
        return torch.sigmoid(self.receptance(x + gap * (1 - self.time_mix_r))) * self.value(k)


class Block(nn.Module):
    """Time mixing, then channel mixing: each reads the normed stream and adds to it."""

    def __init__(self, config: RWKV5Config, first: bool):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)                          # eps 1e-5 in all of them
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ln0 = nn.LayerNorm(config.n_embd) if first else nn.Identity()  # norms the embedding
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x, memory):
        att_x, ffn_x, wkv = memory or (None, None, None)
        x = self.ln0(x)
        x = x + self.att(self.ln1(x), att_x, wkv)
        return x + self.ffn(self.ln2(x), ffn_x)


class RWKV5(nn.Module):
    """RWKV-5: (B, T) ids -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.99), eps=1e-8)
    L2WRAP = 1e-4                            # penalty on large logits; whoever trains applies it

    def __init__(self, config: RWKV5Config):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i == 0) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The authors' values (src/model.py): vectors by depth and channel, matrices orthogonal."""
        L, C, V = self.config.n_layer, self.config.n_embd, self.config.vocab_size
        h = torch.arange(C)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(V / C, 1) ** 0.5)
        for i, block in enumerate(self.blocks):
            deep = i / max(L - 1, 1)                                    # from 0 to 1
            mix = (h / C) ** (1 - i / L)
            att, ffn = block.att, block.ffn
            place = torch.arange(att.time_decay.numel())                # of a channel, or of a head
            ramp = place / max(len(place) - 1, 1)                       # 0 to 1 over them
            ramp, wave = (z.view_as(att.time_decay) for z in (ramp, 0.1 * ((place + 1) % 3 - 1)))
            if self.config.version == "5.2":
                decay, bonus = -6 + 5 * ramp ** (0.7 + 1.3 * deep), deep * (1 - ramp) + wave
            else:
                decay, bonus = -8 + 7 * ramp ** (0.7 + 1.3 * deep), deep * (1 - ramp)
            if self.config.version == "5.0":
                att.time_first.fill_(-3.0)
            else:
                att.time_faaaa.copy_(bonus)
                att.time_mix_g.copy_(mix ** 0.5)
                nn.init.orthogonal_(att.gate.weight, 0.1)
            for parameter, value in (
                    (att.time_mix_k, mix), (att.time_mix_v, mix + 0.3 * deep),
                    (att.time_mix_r, mix ** 0.5), (att.time_decay, decay),
                    (att.ln_x.weight, torch.tensor(((1 + i) / L) ** 0.7)),
                    (ffn.time_mix_k, mix), (ffn.time_mix_r, mix)):
                parameter.copy_(value)
            for zero in (att.output, ffn.value, ffn.receptance):
                zero.weight.zero_()
            for matrix, gain in ((att.key, 0.1), (att.receptance, 1.0), (att.value, 1.0),
                                 (ffn.key, 1.0)):
                nn.init.orthogonal_(matrix.weight, gain)

    def new_state(self, batch_size: int, max_tokens: int | None = None) -> State:
        """An empty memory for `batch_size` rows of any number of ids: `max_tokens` is ignored."""
        config, like = self.config, self.emb.weight
        last = like.new_zeros(batch_size, config.n_layer, config.n_embd, dtype=torch.float32)
        wkv = torch.stack([block.att.first_state(batch_size) for block in self.blocks], 1)
        return State(like.new_zeros(batch_size, dtype=torch.int64), last.detach(),
                     last.detach().clone(), wkv.detach())

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm.

        With a state, the ids go on from what it has seen, and it advances by T. ValueError if it
        has other rows.
        """
        if state is not None and len(tokens) != len(state.position):
            raise ValueError(f"{len(tokens)} rows of tokens, but a state of {len(state.position)}")
        x = self.emb(tokens)                                            # (B, T, C)
        for i, block in enumerate(self.blocks):
            memory = None if state is None else (state.att_x[:, i], state.ffn_x[:, i],
                                                 state.wkv[:, i])
            x = block(x, memory)
        if state is not None:
            state.position += tokens.shape[1]
        return self.ln_out(x)

    def logits(self, hidden: Tensor, state: State | None = None) -> Tensor:
        """(B, T, C) -> (B, T, V): the head."""
        return self.head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V): logits of every position."""
        return self.logits(self.hidden(tokens, state), state)

    def parameter_groups(self) -> list[dict]:
        """Parameters for the optimiser, as the authors: `.weight` matrices decay, time_decay learns
        twice as fast (and time_first of 5.0 three times), the rest is plain."""
        groups = {(1.0, True): [], (2.0, False): [], (3.0, False): [], (1.0, False): []}
        for name, p in self.named_parameters():
            matrix = name.endswith(".weight") and p.dim() > 1
            lr_scale = {"time_decay": 2.0, "time_first": 3.0}.get(name.split(".")[-1], 1.0)
            groups[lr_scale, matrix].append(p)
        return [{"params": params, "lr_scale": lr_scale, "decay": decay}
                for (lr_scale, decay), params in groups.items()]

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu",
                        dtype: torch.dtype | None = None, **overrides) -> "RWKV5":
        """Read a checkpoint, folder or file, in the layout named on top; memory holds it once.

        dtype None keeps the stored one. overrides: config fields that the file tells wrongly.
        ValueError or OSError of one line if it is no such checkpoint.
        """
        path = Path(path)
        stored = dict(to_ours(read_tensors(path)))
        config = read_config((path if path.is_dir() else path.parent) / "config.json")
        config = replace(config, **read_sizes(stored, path))
        unknown = set(overrides) - {field.name for field in fields(config)}
        if unknown:
            raise ValueError(f"RWKV5Config has no field {', '.join(sorted(unknown))}")
        with torch.device("meta"):                                      # shapes, no memory
            model = cls(replace(config, **overrides))
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        tensors = {name: fitted(tensor, shapes.get(name)).to(device, dtype)
                   for name, tensor in stored.items()}
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not fit its config: {reason}") from None
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.pth in the official layout and a small config.json, each as a whole."""
        weights, stated = Path(directory, "model.pth"), Path(directory, "config.json")
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(to_published(self.state_dict()), f"{weights}.part")
        config = json.dumps(published_config(self.config, self.emb.weight.dtype), indent=2)
        Path(f"{stated}.part").write_text(config + "\n", encoding="utf-8")
        os.replace(f"{weights}.part", weights)
        os.replace(f"{stated}.part", stated)

    # --- generate: the same in every model file (tests/test_same.py) ---
    @torch.no_grad()
    def generate(self, prompts, max_new_tokens: int, *, state: State | None = None,
                 temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 stop=(), seed: int | None = None, on_token=None) -> list[list[int]]:
        """Continue each prompt; returns the new ids of each, the stop id left out.

        prompts: lists of ids, of any lengths. temperature 0 takes the likeliest id, else `sample`.
        state: go on from it (one prompt only), advancing it; the last id drawn is not in it.
        stop: ids that end a row. on_token(row, id) is called for every id drawn, the stop id too.
        A row also ends when prompt and new ids fill the context. ValueError if that cannot be done.
        """
        past = 0 if state is None else int(state.position.max())
        context = self.config.context or 2**62
        check_request(prompts, past, context, self.config.vocab_size, max_new_tokens, temperature,
                      top_k, top_p)
        limits = [min(max_new_tokens, context - past - len(prompt)) for prompt in prompts]
        need = past + max(len(p) + max(limit - 1, 0) for p, limit in zip(prompts, limits))
        if state is None:
            state = self.new_state(len(prompts), need)
        elif len(prompts) > 1 or len(state.position) > 1:
            raise ValueError(f"{len(prompts)} prompts and a state of {len(state.position)} rows: "
                             "going on from a state takes one of each")
        elif need > (state.max_tokens or need):
            raise ValueError(f"{need} tokens do not fit into a state made for {state.max_tokens}: "
                             "give new_state a larger max_tokens, or ask for fewer")
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        logits = self.read_prompts([prompts[row] for row in order], state)   # (B, V), in `order`
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        new, going = [[] for _ in prompts], {row for row in order if limits[row]}
        while going:
            ids = sample(logits, temperature, top_k, top_p, generator).tolist()
            for row, drawn in zip(order, ids):
                if row in going:
                    if drawn not in stop:
                        new[row].append(drawn)
                    if drawn in stop or len(new[row]) == limits[row]:
                        going.remove(row)
                    if on_token is not None:
                        on_token(row, drawn)
            if going:
                tokens = torch.tensor(ids, device=logits.device)[:, None]    # (B, 1)
                ended = torch.tensor([row not in going for row in order], device=logits.device)
                state.position -= ended.long()                               # they stay in place
                logits = self.logits(self.hidden(tokens, state), state)[:, -1]
        return new

    def read_prompts(self, prompts: list[list[int]], state: State) -> Tensor:
        """Feed prompts, sorted by length, into their rows of the state; the last logits, (B, V).

        Equal lengths go together, so nothing is padded; long ones go in pieces, to bound memory.
        """
        logits, start = [], 0
        for _, group in itertools.groupby(prompts, key=len):
            tokens = torch.tensor(list(group), device=state.position.device)  # (b, length)
            rows = state.rows(start, start + len(tokens))
            for piece in tokens.split(512, dim=1):
                hidden = self.hidden(piece, rows)
            logits.append(self.logits(hidden[:, -1:], rows)[:, -1])
            start += len(tokens)
        return torch.cat(logits)
    # --- end of generate ---


# --- sample: the same in every model file (tests/test_same.py) ---
def check_request(prompts, past, context, vocab_size, max_new_tokens, temperature, top_k, top_p):
    """ValueError, before any work, for a call of `generate` that cannot be done."""
    if not prompts or not all(prompts):
        raise ValueError("an empty prompt: begin with the id that begins a text")
    lowest, highest = min(map(min, prompts)), max(map(max, prompts))
    longest = past + max(map(len, prompts))
    for wrong, message in (
            (lowest < 0 or highest >= vocab_size, f"prompt ids go from {lowest} to {highest}, the "
             f"vocabulary from 0 to {vocab_size - 1}: is this the model's own tokenizer?"),
            (longest > context, f"the prompt has {longest} tokens, the context of the model is "
             f"{context}: shorten it"),
            (max_new_tokens < 0, f"max_new_tokens is {max_new_tokens}: give 0 or more"),
            (not temperature >= 0, f"temperature is {temperature}: give 0 (greedy) or more"),
            (top_k is not None and top_k < 1, f"top_k is {top_k}: give 1 or more"),
            (top_p is not None and not 0 <= top_p <= 1, f"top_p is {top_p}: give 0 to 1")):
        if wrong:
            raise ValueError(message)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None):
    """(B, V) logits -> (B, V) weights of being drawn: temperature, then top-k, then top-p.

    Ties with the k-th largest stay. top-p keeps the likeliest ids up to and with the one whose mass
    crosses p, as Meta's code does.
    """
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]                         # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        falling, order = probs.sort(dim=-1, descending=True, stable=True)
        beyond = falling.cumsum(-1) - falling > top_p                   # the mass before it is > p
        probs = probs.masked_fill(beyond.gather(-1, order.argsort(-1)), 0.0)
    return probs


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator) -> Tensor:
    """(B, V) logits -> (B,) ids. Drawn on the CPU, so that a seed means the same everywhere."""
    if not logits.amax().isfinite():
        raise ValueError("the logits hold NaN or infinity: damaged weights, or too narrow a dtype "
                         "(float16 overflows where bfloat16 does not)")
    if temperature == 0:
        return logits.argmax(-1)
    probs = probabilities(logits.float().cpu(), temperature, top_k, top_p)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
# --- end of sample ---


# --- read_tensors: the same in every model file (tests/test_same.py) ---
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
    try:
        content = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))             # no zip before torch 1.6
    except Exception as error:               # a damaged pickle can raise anything
        if isinstance(error, OSError) and error.filename:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise ValueError(f"{path} is damaged, or no file of tensors ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def read_tensors(path: str | Path):
    """Yield (name, tensor) from a weight file, or a folder with one or with shards and an index.

    Tensors are mapped from the file, not copied. ValueError or OSError of one line for any fault.
    """
    path = Path(path)
    if path.is_dir():
        kinds = ("model.safetensors.index.json", "model.safetensors",
                 "pytorch_model.bin.index.json", "pytorch_model.bin", "*.pth")
        found = [file for kind in kinds for file in sorted(path.glob(kind))]
        if not found:
            raise FileNotFoundError(f"{path} has no weights: none of {', '.join(kinds)}")
        path = found[0]
    files = {path: None}                     # file -> the names to read from it; None: all
    if path.name.endswith(".index.json"):
        files, places = {}, read_json(path).get("weight_map")
        for name, file in places.items() if isinstance(places, dict) else [("weight_map", places)]:
            if not isinstance(file, str) or Path(file).name != file or "\\" in file:
                raise ValueError(f"{path} puts {name} into {file!r}, which is no file beside it")
            files.setdefault(path.parent / file, []).append(name)
    for file, names in files.items():
        with open(file, "rb") as opened:
            start = opened.read(9)
        if start == b"version h":
            raise ValueError(f"{file} is a pointer to the weights: run `git lfs pull` to get them")
        if start[8:] == b"{":                # 8 bytes of length, then JSON: safetensors
            from safetensors import SafetensorError, safe_open
            try:
                with safe_open(file, framework="pt") as content:
                    for name in names or content.keys():
                        yield name, content.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged: {error}") from None
            continue
        content = read_pickle(file)
        if isinstance(content.get("model"), dict):                      # nanoGPT: beside its args
            content = content["model"]
        for name in names or content:
            if not isinstance(content.get(name), Tensor):
                raise ValueError(f"{file} has no tensor {name}: {type(content.get(name)).__name__}")
            yield name, content[name]
# --- end of read_tensors ---


VERSIONS = (                                 # the first that a name and a shape match names it
    (r"att\.(k_k|x_r) ", "an RWKV-7"),
    (r"att\.time_maa_rkvw_w1 ", "a variant of RWKV-6, x060b or x060c"),
    (r"att\.gate_w1 ", "a variant of RWKV-6, x060a"),
    (r"\.ffnPre\.", "an RWKV whose first block has ffnPre"),
    (r"^head_[qk]\.", "an RWKV with headQK"),
    (r"\.tiny_|att\.qq\.", "an RWKV with attention beside its time mixing (tiny_ or att.qq)"),
    (r"\.pos_emb_", "an RWKV for images, with pos_emb"),
    (r"\.attention\.time_", "an RWKV in the Hugging Face layout"),
    (r"att\.time_maa_x ", "an RWKV-6"),
    (r"att\.ln_x\.weight ", "an RWKV-5"),
    (r"att\.time_mix \(", "an RWKV-2"),
    (r"att\.time_decay \(\d+, 1\)", "an RWKV-3"),
    (r"att\.time_decay ", "an RWKV-4"),
)


def version(tensors: dict[str, Tensor]) -> str:
    """Which RWKV these are the tensors of; they do not state it."""
    seen = [f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()]
    for pattern, what in VERSIONS:
        if any(re.search(pattern, line) for line in seen):
            return what
    return f"no RWKV: it holds {', '.join(seen[:3])}"


def to_ours(tensors):
    """Yield (our name, our tensor) for each published one."""
    for name, tensor in tensors:
        yield name.removeprefix("_forward_module."), tensor             # DeepSpeed's prefix


def to_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Ours are the published ones."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def fitted(tensor: Tensor, shape: torch.Size | None) -> Tensor:
    """The tensor in this shape, if they differ by axes of length 1 only: files have them or not."""
    bare = [[n for n in sizes if n != 1] for sizes in (tensor.shape, shape or ())]
    return tensor.reshape(shape) if bare[0] == bare[1] else tensor


def read_sizes(tensors: dict[str, Tensor], path: Path) -> dict:
    """The sizes in RWKV5Config that shapes tell; ValueError if they are of another model."""
    found = version(tensors)
    if found != "an RWKV-5":
        raise ValueError(f"{path} is {found}: only RWKV-5 (5.0, 5.1, 5.2) is supported")
    try:
        vocab_size, n_embd = tensors["emb.weight"].shape
        decay = tensors["blocks.0.att.time_decay"]                      # (H, D), or (H,)
        gated = "blocks.0.att.gate.weight" in tensors
        by_channel = gated and decay.numel() == n_embd
        return dict(
            vocab_size=vocab_size, n_embd=n_embd,
            n_layer=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            head_size=decay.shape[-1] if by_channel and decay.dim() == 2 else
            n_embd // (1 if by_channel else decay.numel()),
            dim_ffn=tensors["blocks.0.ffn.key.weight"].shape[0],
            version="5.2" if by_channel else "5.1" if gated else "5.0")
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is {found} of which parts are missing: {error}") from None


def read_config(path: Path) -> RWKV5Config:
    """What a config.json adds, if there is one: group_norm_eps and the special ids."""
    stated = read_json(path) if path.exists() else {}
    if stated.get("model_type", "rwkv5") != "rwkv5":
        raise ValueError(f"{path} says model_type = {stated['model_type']!r}: only 'rwkv5' is "
                         "supported")
    eos = stated.get("eos_token_id")
    return RWKV5Config(
        group_norm_eps=stated.get("group_norm_eps", RWKV5Config.group_norm_eps),
        bos_id=stated.get("bos_token_id"), pad_id=stated.get("pad_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def published_config(config: RWKV5Config, dtype: torch.dtype) -> dict:
    """What config.json says of a model whose weights have this dtype: what shapes do not tell."""
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"architectures": ["RWKV5"], "model_type": "rwkv5", "tie_word_embeddings": False,
            "group_norm_eps": config.group_norm_eps,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}


# --- main: the same in every model file, but for the class (tests/test_same.py) ---
def main() -> None:
    """Continue a prompt, on the screen as it is written. chat.py does more."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("weights", help="a checkpoint: folder or file")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--tokenizer", help="folder, file or name, if not beside the weights")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, help="the same seed draws the same text")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them there is")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")                            # where a letter is unknown
    here = [torch.cuda.is_available(), torch.backends.mps.is_available(), True]
    device = args.device or ("cuda", "mps", "cpu")[here.index(True)]
    times = []
    try:
        from tokenizer import load_tokenizer             # text needs it; generate() on ids does not
        tokenizer = load_tokenizer(args.tokenizer or args.weights)
        model = RWKV5.from_pretrained(args.weights, device, getattr(torch, args.dtype or "", None))
        begin = args.prompt.rstrip(" ")                  # the space is a part of the next word
        prompt, decoder = tokenizer.encode(begin), tokenizer.stream_decoder()
        if tokenizer.bos_id is not None or not prompt:
            prompt.insert(0, tokenizer.end_id if tokenizer.bos_id is None else tokenizer.bos_id)

        def show(row, id):
            times.append(time.perf_counter())
            print(decoder.feed([id]) if id not in tokenizer.stop_ids else "", end="", flush=True)
        print(begin, end="", flush=True)
        model.generate([prompt], args.max_new_tokens, temperature=args.temperature, seed=args.seed,
                       top_k=args.top_k, top_p=args.top_p, stop=tokenizer.stop_ids, on_token=show)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    print(f"{decoder.finish()}\n[{len(times)} tokens, {speed:.1f} tokens/s]")


if __name__ == "__main__":
    main()
# --- end of main ---
