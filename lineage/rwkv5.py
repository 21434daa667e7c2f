"""RWKV-5 in one file: RWKV-4 whose memory is a matrix per head, not two sums per channel.

So a layer remembers C D numbers instead of 3 C, and what is read from them depends on the token: r,
which was a gate, is now a query. Nothing is divided by a sum of weights: k needs no exponential and
may be negative, there is no maximum to keep, and a norm of each head (ln_x) bounds y instead. The
output has a new gate, silu(g), paid for by an MLP 3.5 times as wide as the residual stream, not 4.
Three versions: 5.0 has no gate yet; 5.0 and 5.1 have one decay and bonus per head, 5.2 per channel.

The whole forward pass. Each block reads the residual stream x (T, C) and adds to it twice:

    x = ln0(emb[token])
    L times:
        x = x + time_mix(ln1(x))                        where tokens read the past
        x = x + channel_mix(ln2(x))                     in place of the MLP
    logits = ln_out(x) W_head

    time_mix(x), with x' the vector of the token before (at first 0):
        x_k = mix_k x + (1 - mix_k) x'                  mix_k = time_mix_k; likewise x_v, x_r, x_g
        r, k, v = x_r W_receptance, x_k W_key, x_v W_value
        split into H heads of D channels; in each, from S = 0, a (D, D) matrix of keys by values:
            y_t = r_t (S + diag(u) k_tᵀ v_t)            read; u = time_faaaa
            S <- diag(e^w) S + k_tᵀ v_t                 remember; w = -e^time_decay
        return (ln_x(y) * silu(x_g W_gate)) W_output    ln_x: each head normed by itself
    channel_mix(x), with x_k and x_r as above:
        return σ(x_r W_receptance) * (relu(x_k W_key)² W_value)

W_... are matrices, the rest vectors, written as rows and multiplied channel by channel. Each row
of S, a channel of the key, fades at its own rate; the current token has the bonus u. Trained in
parallel like a Transformer, the model runs as an RNN.

    B batch   T time   C channels (n_embd)   H heads   D head size   L layers   V vocabulary

References: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic
Recurrence"; BlinkDL/RWKV-LM@524481d RWKV-v5/src/model.py (x052); BlinkDL/ChatRWKV@965e40b
RWKV_v5_demo.py. On chunks: Yang et al. 2023, "Gated Linear Attention Transformers". Loads and
writes the official .pth of RWKV-5.0, 5.1 and 5.2; its names and shapes tell which, and the sizes.
(What rwkv.cpp calls v5.1 is 5.0 here and in the rwkv package.)

    model = RWKV5.from_pretrained("RWKV-5-World-0.4B.pth",  # or RWKV5(SIZES["0.4b"]), untrained
                                  eos_token_id=0)           # ends a text: files do not state it
    [new] = model.generate([[6699, 304]], 20, temperature=0.8, top_p=0.5, seed=1)
    model.save_pretrained("copy")                           # the rwkv package opens it
    tokens = torch.tensor([[6699, 304, 25740, 109]])        # (B, T); to train on them:
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.optim.AdamW(model.parameter_groups(weight_decay=0.1), **model.OPTIMIZER).step()
"""
import itertools
import json
import math
import os
import re
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK = 64                                   # a sequence is computed in pieces of so many tokens


@dataclass(frozen=True)
class RWKV5Config:
    """Sizes of an RWKV-5. Official files do not state them: they are read from the shapes."""
    vocab_size: int = 65536
    n_embd: int = 1024
    n_layer: int = 24
    head_size: int = 64
    dim_ffn: int = 3584
    version: str = "5.2"                     # or "5.0", "5.1": see above
    group_norm_eps: float = 64e-5            # as the authors: y / 8 is normed with 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    context = None                           # the longest sequence, in tokens: there is no limit

    def __post_init__(self):
        for name in ("vocab_size", "n_embd", "n_layer", "head_size", "dim_ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_embd % self.head_size:
            raise ValueError(f"head_size {self.head_size} does not divide n_embd {self.n_embd}")
        if not 0 <= self.group_norm_eps < 1:
            raise ValueError(f"group_norm_eps is {self.group_norm_eps}: it must be in [0, 1)")
        if self.version not in ("5.0", "5.1", "5.2"):
            raise ValueError(f"version is {self.version!r}: it must be '5.0', '5.1' or '5.2'")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "RWKV5Config":
        """RWKV-5.2 of this depth and width: heads of up to 64 channels; `context` is not used."""
        head_size = max(size for size in range(1, 65) if width % size == 0)
        return cls(vocab_size, width, layers, head_size, max(32, int(3.5 * width) // 32 * 32))


SIZES = {
    "0.1b": RWKV5Config(65536, 768, 12, 64, 3072, "5.0", eos_token_id=0),       # 192,780,576
    "0.4b": RWKV5Config(eos_token_id=0),                                        # 461,721,600
    "1.5b": RWKV5Config(65536, 2048, 24, 64, 7168, eos_token_id=0),             # 1,577,754,624
    "3b": RWKV5Config(65536, 2560, 32, 64, 8960, eos_token_id=0),               # 3,062,999,040
    "7b": RWKV5Config(65536, 4096, 32, 64, 14336, eos_token_id=0),              # 7,518,044,160
}


def previous(x: Tensor, last: Tensor | None) -> Tensor:
    """(B, T, C) -> (B, T, C): at each position the vector of the token before ("token shift").

    Before the first comes `last` (B, C), or 0 if it is None; the last of x overwrites it. Earlier
    tokens are constants: gradients flow only into x.
    """
    if last is None:
        return F.pad(x, (0, 0, 1, -1))       # zeros in at the front, the last token out
    shifted = torch.cat([last[:, None].to(x.dtype), x[:, :-1]], 1)
    last.copy_(x[:, -1].detach())
    return shifted


def wkv5_loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor,
              S0: Tensor) -> tuple[Tensor, Tensor]:
    """What time mixing computes of r, k, v: (B, H, T, D), token by token. It defines `wkv5`.

    w <= 0, the log of the decay, and u, the bonus of the current token: (H, D) or (H, 1). S0:
    (B, H, D, D), key by value, to begin with. Returns y: (B, H, T, D) and the last S.
    """
    S, y = S0, []
    for t in range(r.shape[2]):
        new = k[:, :, t, :, None] * v[:, :, t, None, :]                 # kᵀ v: (B, H, D, D)
        y.append(r[:, :, t, None, :] @ (S + u[..., None] * new))        # (B, H, 1, D)
        S = w.exp()[..., None] * S + new
    return torch.cat(y, 2), S


def wkv5(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor,
         S0: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `wkv5_loop` by matrix products, in fp32 (or fp64) like all official kernels: bf16
    would round away what a long memory adds up."""
    dtype = torch.promote_types(r.dtype, torch.float32)
    r, k, v, w, u, S = (x.to(dtype) for x in (r, k, v, w, u, S0))
    with torch.autocast("cpu" if r.is_meta else r.device.type, enabled=False):  # meta has none
        if r.shape[2] > 1:
            return wkv5_chunks(r, k, v, w, u, S)
        new = k.mT @ v                                                  # (B, H, D, D)
        return r @ (S + u[..., None] * new), w.exp()[..., None] * S + new


def wkv5_chunks(r, k, v, w, u, S):
    """`wkv5` for any T. Tokens of one chunk read each other by a matrix A, the rest through S.

    A[t, t] = (r_t u) k_tᵀ, and A[t, s] = (r_t e^((t-1-s) w)) k_sᵀ for s < t. Two blocks join to:

        A0      0           r1 carries the decay since its block began, k0 that until its block
        r1 k0ᵀ  A1          ends: together, from the earlier token to the later one

    All factors are <= 1, so nothing overflows, however strong the decay. (It would with one product
    for the chunk, of r_t e^((t-1) w) and k_s e^(-s w).)
    """
    T = r.shape[2]
    size = min(CHUNK, 1 << (T.bit_length() - 1))                        # a power of 2 <= T
    if T % size:         # padding would decay S once more for every zero: so smaller chunks instead
        y0, S = wkv5_chunks(*(x[:, :, :T - T % size] for x in (r, k, v)), w, u, S)
        y1, S = wkv5_chunks(*(x[:, :, T - T % size:] for x in (r, k, v)), w, u, S)
        return torch.cat([y0, y1], 2), S
    A = (r * u[:, None] * k).sum(-1)[..., None, None]       # (B, H, n, h, h), n blocks of h = 1
    r, k, w = r[..., None, :], k[..., None, :], w[:, None, None]        # (B, H, n, h, D)
    while A.shape[-1] < size:
        (A0, A1), (r0, r1), (k0, k1) = (
            (x[:, :, ::2], x[:, :, 1::2]) for x in (A, r, k))           # the earlier and the later
        decay = (A.shape[-1] * w).exp()                                 # of a block, (H, 1, 1, D)
        later = torch.cat([r1 @ k0.mT, A1], -1)                         # (B, H, n / 2, h, 2 h)
        A = torch.cat([F.pad(A0, (0, A.shape[-1])), later], -2)         # (B, H, n / 2, 2 h, 2 h)
        r, k = torch.cat([r0, decay * r1], -2), torch.cat([decay * k0, k1], -2)
    v = v.unflatten(2, (-1, size))                                      # (B, H, n, h, D)
    kept = (size * w[:, 0]).exp().mT                                    # of S, (H, D, 1), by chunk
    before = []                                                         # S as each chunk begins
    for new in (k.mT @ v).unbind(2):                                    # (B, H, D, D)
        before.append(S)
        S = kept * S + new
    y = A @ v + r @ torch.stack(before, 2)                              # (B, H, n, h, D)
    return y.flatten(2, 3), S


class HeadNorm(nn.GroupNorm):
    """The output of each head normed by itself, (B, H, T, D) -> (B, T, C), in the fp32 of y."""

    def forward(self, y):
        y = F.layer_norm(y, y.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        return y * self.weight.float() + self.bias.float()


class TimeMix(nn.Module):
    """What attention is elsewhere: tokens read the past, here summed up in one matrix per head."""

    def __init__(self, config: RWKV5Config):
        super().__init__()
        C, D = config.n_embd, config.head_size
        self.heads, self.version = C // D, config.version
        per_head = (self.heads, D) if self.version == "5.2" else (self.heads,)
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))            # mix_k: share of this token
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))            # mix_v
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))            # mix_r
        self.time_decay = nn.Parameter(torch.empty(per_head))           # log(-w)
        if self.version == "5.0":
            self.time_first = nn.Parameter(torch.empty(per_head))       # log(u)
        else:
            self.time_faaaa = nn.Parameter(torch.empty(per_head))       # u
            self.time_mix_g = nn.Parameter(torch.empty(1, 1, C))        # mix_g
            self.gate = nn.Linear(C, C, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = HeadNorm(self.heads, C, config.group_norm_eps)

    def forward(self, x, last, S):
        gap = previous(x, last) - x                         # x_k = x + (1 - mix_k) gap: (B, T, C)
        r = self.receptance(x + gap * (1 - self.time_mix_r))
        k = self.key(x + gap * (1 - self.time_mix_k))
        v = self.value(x + gap * (1 - self.time_mix_v))
        w = -torch.exp(self.time_decay.float())             # fp32: its error adds up over time
        u = self.time_first.float().exp() if self.version == "5.0" else self.time_faaaa
        r, k, v = (z.unflatten(2, (self.heads, -1)).transpose(1, 2) for z in (r, k, v))
        w, u = w.view(self.heads, -1), u.view(self.heads, -1)           # (H, D), or (H, 1)
        B, H, _, D = r.shape
        S0 = r.new_zeros(B, H, D, D) if S is None else S.clone()        # S is overwritten below
        y, S1 = wkv5(r, k, v, w, u, S0)
        if S is not None:
            S.copy_(S1.detach())
        y = self.ln_x(y).to(v.dtype)
        if self.version != "5.0":
            y = y * F.silu(self.gate(x + gap * (1 - self.time_mix_g)))
        return self.output(y)


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between them, behind a gate."""

    def __init__(self, config: RWKV5Config):
        super().__init__()
        C = config.n_embd
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))            # mix_k
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))            # mix_r
        self.key = nn.Linear(C, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(config.dim_ffn, C, bias=False)

    def forward(self, x, last):
        gap = previous(x, last) - x                         # x_k = x + (1 - mix_k) gap: (B, T, C)
        k = F.relu(self.key(x + gap * (1 - self.time_mix_k))) ** 2      # (B, T, dim_ffn)
        return torch.sigmoid(self.receptance(x + gap * (1 - self.time_mix_r))) * self.value(k)


class Block(nn.Module):
    """Time mixing, then channel mixing: each reads the normed residual stream and adds to it."""

    def __init__(self, config: RWKV5Config, first: bool):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)                          # eps 1e-5 in all of them
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.ln0 = nn.LayerNorm(config.n_embd) if first else nn.Identity()  # norms the embedding
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x, att_x=None, ffn_x=None, wkv=None):
        x = self.ln0(x)
        x = x + self.att(self.ln1(x), att_x, wkv)
        return x + self.ffn(self.ln2(x), ffn_x)


class State(NamedTuple):
    """What a batch remembers, updated in place: per layer two vectors and S, in fp32."""
    position: Tensor                         # (B,) int64: number of tokens seen, row by row
    att_x: Tensor                            # (B, L, C): the last input of time mixing
    ffn_x: Tensor                            # (B, L, C): the last input of channel mixing
    wkv: Tensor                              # (B, L, H, D, D): S, key by value
    capacity = math.inf                      # the number of tokens that fit


class RWKV5(nn.Module):
    """RWKV-5: (B, T) tokens -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.99), eps=1e-8)
    L2WRAP = 1e-4                            # penalty on the largest logits, which train.py adds

    def __init__(self, config: RWKV5Config):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i == 0) for i in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:     # on meta, drawing takes seconds
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The authors' values (src/model.py): vectors by depth and channel, matrices orthogonal."""
        L, C, V = self.config.n_layer, self.config.n_embd, self.config.vocab_size
        h = torch.arange(C)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(V / C, 1) ** 0.5)
        for i, block in enumerate(self.blocks):
            depth = i / max(L - 1, 1)                                   # 0 to 1 over the layers
            mix = (h / C) ** (1 - i / L)
            att, ffn = block.att, block.ffn
            place = torch.arange(att.time_decay.numel()).view_as(att.time_decay)
            ramp = place / max(place.numel() - 1, 1)        # 0 to 1 over the channels or heads
            wave = 0.1 * ((place + 1) % 3 - 1) if att.version == "5.2" else 0.0
            lowest = -6 if att.version == "5.2" else -8
            if att.version == "5.0":
                att.time_first.fill_(-3.0)
            else:
                att.time_faaaa.copy_(depth * (1 - ramp) + wave)
                att.time_mix_g.copy_(mix ** 0.5)
                nn.init.orthogonal_(att.gate.weight, 0.1)
            for parameter, value in (
                    (att.time_mix_k, mix), (att.time_mix_v, mix + 0.3 * depth),
                    (att.time_mix_r, mix ** 0.5),
                    (att.time_decay, lowest - (1 + lowest) * ramp ** (0.7 + 1.3 * depth)),
                    (att.ln_x.weight, torch.tensor(((1 + i) / L) ** 0.7)),
                    (ffn.time_mix_k, mix), (ffn.time_mix_r, mix)):
                parameter.copy_(value)
            for matrix in (att.output, ffn.value, ffn.receptance):
                matrix.weight.zero_()
            for matrix, gain in ((att.key, 0.1), (att.receptance, 1.0), (att.value, 1.0),
                                 (ffn.key, 1.0)):
                nn.init.orthogonal_(matrix.weight, gain)

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) after the final norm. With a state, the tokens continue the
        sequence that it has seen, and it advances by T."""
        if state is not None and len(state.position) != len(tokens):
            raise ValueError(f"{len(tokens)} rows of tokens, but a state of {len(state.position)}")
        x = self.emb(tokens)                                            # (B, T, C)
        for i, block in enumerate(self.blocks):
            past = () if state is None else (state.att_x[:, i], state.ffn_x[:, i], state.wkv[:, i])
            x = block(x, *past)
        if state is not None:
            state.position.add_(tokens.shape[1])
        return self.ln_out(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V): the head, for a loss that is computed piece by piece."""
        return self.head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None, last: bool = False) -> Tensor:
        """(B, T) tokens -> (B, T, V): logits of every position, or (B, 1, V) of the last one."""
        hidden = self.hidden(tokens, state)
        return self.head(hidden[:, -1:] if last else hidden)

    def new_state(self, batch_size: int, max_tokens: int | None = None) -> State:
        """An empty state for `batch_size` rows; `max_tokens` is not used: there is no limit."""
        c, like = self.config, self.emb.weight
        last = like.new_zeros(batch_size, c.n_layer, c.n_embd, dtype=torch.float32)
        wkv = last.new_zeros(batch_size, c.n_layer, c.n_embd // c.head_size,
                             c.head_size, c.head_size)
        return State(like.new_zeros(batch_size, dtype=torch.int64), last, last.clone(), wkv)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Every parameter once, in groups for torch.optim.AdamW: only matrices decay. AdamW ignores
        two keys, which train.py reads: `lr_scale`, the authors' factor of the learning rate, and
        `hidden_matrix`, true for the 2-D matrices inside the blocks (for optimisers like Muon)."""
        groups = {}
        for name, p in self.named_parameters():
            matrix = name.endswith(".weight") and p.dim() == 2
            scale = 2.0 if "time_decay" in name else 3.0 if "time_first" in name else 1.0
            groups.setdefault((matrix, scale, matrix and name.startswith("blocks.")), []).append(p)
        return [dict(params=params, weight_decay=weight_decay if matrix else 0.0, lr_scale=scale,
                     hidden_matrix=hidden) for (matrix, scale, hidden), params in groups.items()]

    # --- generate: the same in every model file (tests/test_same.py) ---
    @torch.no_grad()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, state: State | None = None,
                 temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 stop=None, seed: int | None = None, on_token=None) -> list[list[int]]:
        """Continue each prompt, a list of tokens; returns the new tokens of each.

        A row ends at a token in `stop` (None: the config's eos_token_id), which is left out, after
        max_new_tokens, or when its context is full. temperature 0 is greedy, otherwise see
        `probabilities`. on_token(row, token) is called for every token drawn, the stop token too.
        state: continue this cached sequence (one prompt only) and leave it advanced; the last token
        drawn has not been fed to it. Dropout is off meanwhile. ValueError if it cannot be done.
        """
        context, V = self.config.context or math.inf, self.config.vocab_size
        stop = self.config.eos_token_id if stop is None else stop
        stop = [] if stop is None else [stop] if isinstance(stop, int) else stop
        for tokens in (*prompts, stop):
            if not isinstance(tokens, (list, tuple, set)) or not {*map(type, tokens)} <= {int}:
                raise ValueError("expected prompts as a list of lists of ints, stop as an int or a "
                                 f"list of ints, found {tokens!r:.10}")
        if not prompts or not all(prompts):
            raise ValueError("an empty prompt: begin with the token that begins a text")
        low, high = min(map(min, prompts)), max(map(max, prompts))
        if low < 0 or high >= V:
            raise ValueError(f"prompt tokens {low} to {high}, but the vocabulary has 0 to {V - 1}")
        if not (max_new_tokens >= 0 and temperature >= 0 and (top_k is None or top_k >= 1)
                and (top_p is None or 0 <= top_p <= 1)):
            raise ValueError(f"max_new_tokens {max_new_tokens} and temperature {temperature} must "
                             f"not be negative, top_k {top_k} not below 1, top_p {top_p} in [0, 1]")
        past = 0 if state is None else int(state.position.max())
        limits = [min(max_new_tokens, context - past - len(prompt)) for prompt in prompts]
        # what will be fed: not the last new token. A limit below 0: the prompt is too long
        needed = past + max(len(p) + max(n - 1, 0) for p, n in zip(prompts, limits))
        if state is None:
            state = self.new_state(len(prompts), needed)
        elif len(prompts) > 1 or len(state.position) > 1:
            raise ValueError(f"{len(prompts)} prompts and a state of {len(state.position)} rows: "
                             "continuing a state takes one of each")
        if needed > state.capacity:
            raise ValueError(f"{needed} tokens do not fit: the context of the model is {context}, "
                             f"the state was made for {state.capacity}")
        seed = torch.Generator().seed() if seed is None else seed
        generator = torch.Generator().manual_seed(seed)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        new, active = [[] for _ in prompts], {row for row in order if limits[row]}
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            logits = self.read_prompts([prompts[row] for row in order], state)   # (B, V)
            while active:
                tokens = sample(logits, temperature, top_k, top_p, generator)    # (B,)
                for row, token in zip(order, tokens.tolist()):
                    if row in active:
                        if token not in stop:
                            new[row].append(token)
                        if token in stop or len(new[row]) == limits[row]:
                            active.remove(row)
                        if on_token is not None:
                            on_token(row, token)
                if active:                   # ended rows are fed too, but inside the cache
                    state.position.clamp_(max=needed - 1)
                    logits = self(tokens[:, None], state, last=True)[:, 0]
        finally:
            for module, mode in modes.items():
                module.training = mode
        return new

    def read_prompts(self, prompts: list[list[int]], state: State) -> Tensor:
        """Feed prompts, sorted by length, into their rows of the state; the last logits, (B, V).

        Equal lengths go together, so nothing is padded; long ones go in pieces, to bound memory.
        """
        logits, start = [], 0
        for _, group in itertools.groupby(prompts, key=len):
            tokens = torch.tensor(list(group), device=state.position.device)     # (b, length)
            rows = state._make(t[start:start + len(tokens)] for t in state)      # views of it
            for piece in tokens.split(512, dim=1):
                final = self(piece, rows, last=True)                             # (b, 1, V)
            logits.append(final[:, 0])
            start += len(tokens)
        return torch.cat(logits)
    # --- end of generate ---

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu",
                        dtype: torch.dtype | None = None, **overrides) -> "RWKV5":
        """Read an official .pth, or the one in a folder; only one copy in memory.

        dtype None: that of its matrices. overrides: config fields that the file does not state.
        """
        config, tensors = read_pth(Path(path))
        with torch.device("meta"):                                      # shapes, no memory
            model = cls(replace(config, **overrides))
        dtype = dtype or tensors["blocks.0.att.key.weight"].dtype
        weights = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
        for name, p in model.named_parameters():    # files have (C,) or (C, 1) for (1, 1, C)
            if name in weights and weights[name].squeeze().shape == p.squeeze().shape:
                weights[name] = weights[name].reshape(p.shape)
        model.load_state_dict(weights, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.pth in the official layout and config.json, each as a whole."""
        weights, stated = Path(directory, "model.pth"), Path(directory, "config.json")
        others = [file.name for file in weights.parent.glob("*.pth") if file != weights]
        if others:                           # one of several: which, a reader could not tell
            raise ValueError(f"{directory} holds {', '.join(others)}: save into another folder")
        weights.parent.mkdir(parents=True, exist_ok=True)
        dtype = str(self.emb.weight.dtype).removeprefix("torch.")
        config = {"architectures": ["RWKV5"], "model_type": "rwkv5", "tie_word_embeddings": False,
                  "torch_dtype": dtype, "dtype": dtype, "hidden_size": self.config.n_embd,
                  "num_hidden_layers": self.config.n_layer,
                  **asdict(self.config)}
        torch.save(dict(self.state_dict()), f"{weights}.part")
        Path(f"{stated}.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(f"{weights}.part", weights)
        os.replace(f"{stated}.part", stated)


# --- sample: the same in every model file (tests/test_same.py) ---
def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None):
    """(B, V) logits -> (B, V) sampling probabilities: temperature, then top-k, then top-p.

    Ties with the k-th largest stay. top-p keeps the most likely tokens up to and including the one
    that crosses p, as Meta's code does. What is left need not sum to 1.
    """
    logits = logits / max(temperature, 1e-20)           # below that: greedy, without overflow
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]                         # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        # Sorting all of V is slow. The p < (1 - top_p) / V weigh less than 1 - top_p together, so
        # they lie behind the cut and can go first; half of that, for rounding.
        probs = probs.masked_fill(probs < (1 - top_p) / (2 * probs.shape[-1]), 0.0)
        for row in probs:                                               # (V,), few of them not 0
            likely = row.nonzero()[:, 0]
            falling, order = row[likely].sort(descending=True, stable=True)
            before = falling.cumsum(-1) - falling                       # the mass in front of each
            row[likely[order[before > top_p]]] = 0.0
    return probs


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None,
           generator: torch.Generator) -> Tensor:
    """(B, V) logits -> (B,) tokens, drawn on the CPU: a seed means the same on every device."""
    if not logits.amax().isfinite():
        raise ValueError("the logits hold NaN or infinity: damaged weights, or float16 too narrow")
    if temperature == 0:
        return logits.argmax(-1)
    probs = probabilities(logits.float().cpu(), temperature, top_k, top_p)
    return torch.multinomial(probs, 1, generator=generator)[:, 0].to(logits.device)
# --- end of sample ---


# ------------------------------------------ plumbing from here on: reading and writing checkpoints

def read_pth(path: Path) -> tuple[RWKV5Config, dict[str, Tensor]]:
    """(config, tensors) of a .pth, or of the one in a folder. config.json beside it is optional."""
    files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
    if len(files) != 1:
        raise ValueError(f"{path} holds {[file.name for file in files]}: pass the path of one .pth")
    tensors = torch.load(files[0], map_location="cpu", weights_only=True,
                         mmap=zipfile.is_zipfile(files[0]))             # no zip before torch 1.6
    for around in ("module", "model_state_dict", "state_dict", "model"):
        tensors = tensors.get(around, tensors)
    tensors = {re.sub(r"^((model|module|_\w+)\.)+|(?<=\.)_\w+\.", "", name): tensor
               for name, tensor in tensors.items()}
    beside = files[0].with_name("config.json")
    stated = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    V, C = tensors["emb.weight"].shape
    decay = tensors["blocks.0.att.time_decay"]                          # (H, D) in 5.2, else (H,)
    gated = "blocks.0.att.gate.weight" in tensors
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    sizes = dict(vocab_size=V, n_embd=C, n_layer=len(layers),
                 dim_ffn=len(tensors["blocks.0.ffn.key.weight"]),
                 head_size=C // len(decay),
                 version="5.0" if not gated else "5.1" if decay.dim() == 1 else "5.2")
    known = {field.name: stated[field.name] for field in fields(RWKV5Config)
             if stated.get(field.name) is not None}
    return RWKV5Config(**{**known, **sizes}), tensors                   # shapes win
