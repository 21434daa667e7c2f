"""RWKV-6 in one file: build it, train it, load the published weights, generate.

A language model without attention: trained in parallel like a Transformer, it runs as an RNN.
The whole forward pass. Each block reads the residual stream x (T, C) and adds to it twice:

    x = ln0(emb[token])
    L times:
        x = x + time_mix(ln1(x))                        where tokens read the past
        x = x + channel_mix(ln2(x))                     in place of the MLP
    logits = ln_out(x) W_head

    time_mix(x), with x' the vector of the token before (at first 0):
        m_w, m_k, m_v, m_r, m_g = tanh((x + time_maa_x (x' - x)) time_maa_w1) time_maa_w2
        x_k = x + (time_maa_k + m_k) (x' - x)           likewise x_w, x_v, x_r, x_g
        r, k, v = x_r W_receptance, x_k W_key, x_v W_value
        w = -exp(time_decay + tanh(x_w time_decay_w1) time_decay_w2)
        split into H heads of D channels; in each, from S = 0, a (D, D) matrix of keys by values:
            y_t = r_t (S + diag(u) k_tᵀ v_t)            read; u = time_faaaa
            S <- diag(e^w_t) S + k_tᵀ v_t               remember
        return (ln_x(y) * silu(x_g W_gate)) W_output    ln_x: each head normed by itself
    channel_mix(x), with x_k, x_r = x + time_maa_k (x' - x), x + time_maa_r (x' - x):
        return σ(x_r W_receptance) * (relu(x_k W_key)² W_value)

W_... are matrices, ..._w1 and ..._w2 pairs of low rank (five in time_maa), the rest vectors,
written as rows and multiplied channel by channel. The name: receptance (the query), w (the log of
the decay), key, value. What differs from GPT-2:

* no attention: each head sums up its past in a matrix S of keys by values, which the query r reads.
  No positions, no limit to the context, and the millionth token costs what the tenth did;
* "token shift": what a matrix reads is a mix of this token's vector and the one before;
* the decay e^w of each row of S and, in time mixing, the shares of the token shift are computed
  from the token itself. This is new in RWKV-6: what it reads decides what it forgets;
* the MLP is a squared ReLU behind a gate; the only biases are those of norms; the embedding is
  normed first, and the head is a matrix of its own.

    B batch   T time   C channels (n_embd)   H heads   D head size   L layers   V vocabulary

References: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic
Recurrence"; BlinkDL/RWKV-LM@524481d RWKV-v5/src/model.py (x060); BlinkDL/ChatRWKV@965e40b
RWKV_v6_demo.py. On chunks: Yang et al. 2023, "Gated Linear Attention Transformers". Loads and
writes the official .pth, also with a tuned state merged into it; sizes are read from it.

    model = RWKV6.from_pretrained("RWKV-x060-World-1B6.pth",    # or RWKV6(SIZES["1.6b"]), untrained
                                  eos_token_id=0)               # ends a text: files do not state it
    [new] = model.generate([[6699, 304]], 20, temperature=0.8, top_p=0.5, seed=1)
    model.save_pretrained("copy")                               # the rwkv package opens it
    tokens = torch.tensor([[6699, 304, 25740, 109]])            # (B, T); to train on them:
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
class RWKV6Config:
    """Sizes of an RWKV-6. Official files do not state them: they are read from the shapes."""
    vocab_size: int = 65536
    n_embd: int = 2048
    n_layer: int = 24
    head_size: int = 64
    dim_ffn: int = 7168
    mix_lora: int = 32                       # rank of time_maa_w1 and time_maa_w2
    decay_lora: int = 64                     # rank of time_decay_w1 and time_decay_w2
    group_norm_eps: float = 64e-5            # as the authors: y / 8 is normed with 1e-5
    tuned_state: bool = False                # has att.time_state: a trained S to begin with
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    context = None                           # the longest sequence, in tokens: there is no limit

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.endswith(("_size", "_embd", "_layer", "_ffn", "_lora")) and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.n_embd % self.head_size:
            raise ValueError(f"head_size {self.head_size} does not divide n_embd {self.n_embd}")
        if not 0 <= self.group_norm_eps < 1:
            raise ValueError(f"group_norm_eps is {self.group_norm_eps}: it must be in [0, 1)")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "RWKV6Config":
        """RWKV-6 of this depth and width: heads of up to 64 channels; `context` is not used."""
        head_size = max(size for size in range(1, 65) if width % size == 0)
        rank = 32 if width < 4096 else 64
        return cls(vocab_size, width, layers, head_size, max(32, int(3.5 * width) // 32 * 32),
                   mix_lora=min(rank, max(1, width // 2)),
                   decay_lora=min(2 * rank, max(1, width // 2)))


SIZES = {
    "1.6b": RWKV6Config(eos_token_id=0),                                        # 1,599,873,024
    "3b": RWKV6Config(65536, 2560, 32, 64, 8960, eos_token_id=0),               # 3,099,863,040
    "7b": RWKV6Config(65536, 4096, 32, 64, 14336, 64, 128, eos_token_id=0),     # 7,635,746,816
    "14b": RWKV6Config(65536, 4096, 61, 64, 14336, 64, 128, eos_token_id=0),    # 14,069,088,256
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


def wkv6_loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor,
              S0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence of time mixing, token by token. It defines what `wkv6` computes.

    r, k, v, w: (B, H, T, D), w <= 0 the log of the decay; u: (H, D), bonus of the current token;
    S0: (B, H, D, D), key by value, to begin with. Returns y: (B, H, T, D) and the last S.
    """
    y, S = [], S0
    for t in range(r.shape[2]):
        new = k[:, :, t, :, None] * v[:, :, t, None, :]                 # kᵀ v: (B, H, D, D)
        y.append(r[:, :, t, None, :] @ (S + u[..., None] * new))        # (B, H, 1, D)
        S = w[:, :, t, :, None].exp() * S + new
    return torch.cat(y, 2), S


def wkv6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor,
         S0: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `wkv6_loop` by matrix products, in fp32 (or fp64) like all official kernels: bf16
    would round away what a long memory adds up."""
    dtype = torch.promote_types(r.dtype, torch.float32)
    r, k, v, w, u, S = (x.to(dtype) for x in (r, k, v, w, u, S0))
    with torch.autocast("cpu" if r.is_meta else r.device.type, enabled=False):  # meta has none
        if r.shape[2] > 1:
            return wkv6_chunks(r, k, v, w, u, S)
        new = k.mT @ v                                                  # (B, H, D, D)
        return r @ (S + u[..., None] * new), w.exp().mT * S + new


def wkv6_chunks(r, k, v, w, u, S):
    """`wkv6` for any T: after 6 joins for all at once, T / 64 steps instead of T. Tokens of one
    chunk read each other by a matrix A, and what was before through S.

    A[t, s] is the weight of token s in y_t. It begins as the diagonal, with the bonus; then blocks
    of h tokens are joined in pairs to blocks of 2 h. A digit is the step that fills the place:

        0 . . .         0 . . .         0 . . .         r1 k0ᵀ: the later block reads the earlier.
        . 0 . .         1 0 . .         1 0 . .         r carries the decay since its block began,
        . . 0 .   ->    . . 0 .   ->    2 2 0 .         k that until its block ends: together, all
        . . . 0         . . 1 0         2 2 1 0         the decay between the two tokens.

    All factors are <= 1, so nothing overflows, however strong the decay. (In one product for the
    whole chunk, r_t e^(w_1 + ... + w_{t-1}) times k_s e^-(w_1 + ... + w_s), the second does.)
    """
    T = r.shape[2]
    size = CHUNK if T >= CHUNK else 1 << (T - 1).bit_length()           # a power of 2
    r, k, v, w = (F.pad(x, (0, 0, 0, -T % size)) for x in (r, k, v, w))     # zeros leave S alone
    A = (r * u[:, None] * k).sum(-1)[..., None, None]       # (B, H, n, h, h): n blocks of h = 1
    r, k, decay = (x[..., None, :] for x in (r, k, w.exp()))            # (B, H, n, h, D)
    while A.shape[-1] < size:
        (A0, A1), (r0, r1), (k0, k1), (decay0, decay1) = (
            (x[:, :, ::2], x[:, :, 1::2]) for x in (A, r, k, decay))    # the earlier and the later
        later = torch.cat([r1 @ k0.mT, A1], -1)                         # (B, H, n / 2, h, 2 h)
        A = torch.cat([F.pad(A0, (0, A.shape[-1])), later], -2)         # (B, H, n / 2, 2 h, 2 h)
        r, k = torch.cat([r0, decay0 * r1], -2), torch.cat([decay1 * k0, k1], -2)
        decay = decay0 * decay1                                         # (B, H, n, 1, D)
    v = v.unflatten(2, (-1, size))                                      # (B, H, n, h, D)
    before = []                                                         # S as each chunk begins
    for kept, new in zip(decay.mT.unbind(2), (k.mT @ v).unbind(2)):     # (B, H, D, 1), (B, H, D, D)
        before.append(S)
        S = kept * S + new
    y = A @ v + r @ torch.stack(before, 2)                              # (B, H, n, h, D)
    return y.flatten(2, 3)[:, :, :T], S


class HeadNorm(nn.GroupNorm):
    """The output of each head normed by itself, (B, H, T, D) -> (B, T, C), in the fp32 of y."""

    def forward(self, y):
        y = F.layer_norm(y, y.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        return y * self.weight.float() + self.bias.float()


class TimeMix(nn.Module):
    """What attention is elsewhere: tokens read the past, here summed up in one matrix per head."""

    def __init__(self, config: RWKV6Config):
        super().__init__()
        C, H, D = config.n_embd, config.n_embd // config.head_size, config.head_size
        self.heads = H
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))            # shares of the token before
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * config.mix_lora))    # (w, k, v, r, g)
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.mix_lora, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))            # log(-w)
        self.time_decay_w1 = nn.Parameter(torch.empty(C, config.decay_lora))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_lora, C))
        self.time_faaaa = nn.Parameter(torch.empty(H, D))               # u: bonus of this token
        self.time_state = nn.Parameter(torch.zeros(H, D, D)) if config.tuned_state else None
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.ln_x = HeadNorm(H, C, config.group_norm_eps)

    def first_state(self, batch_size: int) -> Tensor:
        """S before the first token, (B, H, D, D) fp32: zeros, or the tuned state."""
        if self.time_state is None:
            H, D = self.time_faaaa.shape
            return torch.zeros(batch_size, H, D, D, dtype=torch.float32,
                               device=self.time_faaaa.device)
        return self.time_state.float().mT.expand(batch_size, -1, -1, -1)    # stored value by key

    def forward(self, x, last, S):
        gap = previous(x, last) - x                                     # x' - x: (B, T, C)
        low = torch.tanh((x + gap * self.time_maa_x) @ self.time_maa_w1)    # (B, T, 5 rank)
        low = low.unflatten(2, (5, -1)).permute(2, 0, 1, 3).flatten(1, 2)   # (5, B T, rank)
        m_w, m_k, m_v, m_r, m_g = (low @ self.time_maa_w2).unflatten(1, x.shape[:2])
        x_w = x + gap * (self.time_maa_w + m_w)
        r = self.receptance(x + gap * (self.time_maa_r + m_r))
        k = self.key(x + gap * (self.time_maa_k + m_k))
        v = self.value(x + gap * (self.time_maa_v + m_v))
        g = F.silu(self.gate(x + gap * (self.time_maa_g + m_g)))
        change = torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        w = -torch.exp(self.time_decay.float() + change.float())        # fp32: errors add up over t
        r, k, v, w = (z.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
                      for z in (r, k, v, w))
        S0 = self.first_state(len(x)) if S is None else S.clone()       # S is overwritten below
        y, S1 = wkv6(r, k, v, w, self.time_faaaa, S0)
        if S is not None:
            S.copy_(S1.detach())
        return self.output(self.ln_x(y).to(g.dtype) * g)


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between them, behind a gate."""

    def __init__(self, config: RWKV6Config):
        super().__init__()
        C = config.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))            # shares of the token before
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = nn.Linear(C, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(config.dim_ffn, C, bias=False)

    def forward(self, x, last):
        gap = previous(x, last) - x                                     # (B, T, C)
        k = F.relu(self.key(x + gap * self.time_maa_k)) ** 2            # (B, T, dim_ffn)
        return torch.sigmoid(self.receptance(x + gap * self.time_maa_r)) * self.value(k)


class Block(nn.Module):
    """Time mixing, then channel mixing: each reads the normed residual stream and adds to it."""

    def __init__(self, config: RWKV6Config, first: bool):
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


class RWKV6(nn.Module):
    """RWKV-6: (B, T) tokens -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.99), eps=1e-8)
    L2WRAP = 1e-4                            # penalty on the largest logits, which train.py adds

    def __init__(self, config: RWKV6Config):
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
        ramp = h / max(C - 1, 1)                                        # 0 to 1 over the channels
        wave = 0.1 * ((h + 1) % 3 - 1)
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(V / C, 1) ** 0.5)
        for i, block in enumerate(self.blocks):
            depth = i / max(L - 1, 1)                                   # 0 to 1 over the layers
            mix = (h / C) ** (1 - i / L)
            att, ffn = block.att, block.ffn
            for parameter, value in (
                    (att.time_maa_x, 1 - mix), (att.time_maa_w, 1 - mix), (att.time_maa_k, 1 - mix),
                    (att.time_maa_v, 1 - mix - 0.3 * depth),
                    (att.time_maa_r, 1 - mix ** 0.5), (att.time_maa_g, 1 - mix ** 0.5),
                    (att.time_decay, -6 + 5 * ramp ** (0.7 + 1.3 * depth)),
                    (att.time_faaaa, (depth * (1 - ramp) + wave).view_as(att.time_faaaa)),
                    (att.ln_x.weight, torch.tensor(((1 + i) / L) ** 0.7)),
                    (ffn.time_maa_k, 1 - (h / C) ** ((1 - i / L) ** 3)),
                    (ffn.time_maa_r, 1 - (h / C) ** ((1 - i / L) ** 3))):
                parameter.copy_(value)
            for zero in (att.time_maa_w1, att.time_decay_w1, att.output.weight, ffn.value.weight,
                         ffn.receptance.weight):
                zero.zero_()
            for small in (att.time_maa_w2, att.time_decay_w2):
                nn.init.uniform_(small, -0.01, 0.01)
            for matrix, gain in ((att.key, 0.1), (att.gate, 0.1), (att.receptance, 1.0),
                                 (att.value, 1.0), (ffn.key, 1.0)):
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

    @torch.no_grad()
    def new_state(self, batch_size: int, max_tokens: int | None = None) -> State:
        """An empty state for `batch_size` rows; `max_tokens` is not used: there is no limit."""
        c, like = self.config, self.emb.weight
        last = like.new_zeros(batch_size, c.n_layer, c.n_embd, dtype=torch.float32)
        wkv = torch.stack([block.att.first_state(batch_size) for block in self.blocks], 1)
        return State(like.new_zeros(batch_size, dtype=torch.int64), last, last.clone(), wkv)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Every parameter once, in groups for torch.optim.AdamW. As the authors have it, matrices
        (not those of low rank) and a tuned state decay, and time_decay learns twice as fast.

        Two keys are for train.py, AdamW ignores them: `lr_scale`, the authors' factor of the
        learning rate, and `hidden_matrix`, true for the 2-D matrices inside the blocks.
        """
        groups = {}
        for name, p in self.named_parameters():
            matrix = name.endswith(".weight") and p.dim() == 2
            decay = weight_decay if matrix or name.endswith("time_state") else 0.0
            scale = 2.0 if name.endswith("time_decay") else 1.0
            hidden = matrix and name.startswith("blocks.")
            groups.setdefault((decay, scale, hidden), []).append(p)
        return [dict(params=params, weight_decay=decay, lr_scale=scale, hidden_matrix=hidden)
                for (decay, scale, hidden), params in groups.items()]

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
                        dtype: torch.dtype | None = None, **overrides) -> "RWKV6":
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
        config = {"architectures": ["RWKV6"], "model_type": "rwkv6", "tie_word_embeddings": False,
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

def read_pth(path: Path) -> tuple[RWKV6Config, dict[str, Tensor]]:
    """(config, tensors) of a .pth, or of the one in a folder. config.json beside it is optional."""
    files = (sorted(path.glob("*.pth")) or [path / "model.pth"]) if path.is_dir() else [path]
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
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    sizes = dict(vocab_size=V, n_embd=C, n_layer=len(layers),
                 dim_ffn=len(tensors["blocks.0.ffn.key.weight"]),
                 head_size=tensors["blocks.0.att.time_faaaa"].squeeze().shape[-1],
                 mix_lora=tensors["blocks.0.att.time_maa_w1"].shape[1] // 5,
                 decay_lora=tensors["blocks.0.att.time_decay_w1"].shape[1],
                 tuned_state="blocks.0.att.time_state" in tensors)
    known = {field.name: stated[field.name] for field in fields(RWKV6Config)
             if stated.get(field.name) is not None}
    return RWKV6Config(**{**known, **sizes}), tensors                   # shapes win
