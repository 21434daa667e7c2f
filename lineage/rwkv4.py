"""RWKV-4 in one file: RWKV-3 whose weighted mean is exact for every key.

RWKV-3 cut keys off at 60, since e^k overflows, and added a small ε to the denominator, which pulls
y to 0 where every k is low. RWKV-4 has neither: it keeps both sums divided by e^o, o being their
largest exponent, max_s k_s + (t - s) w, and a third vector to remember. Besides, training pulls the
largest logit of each position towards 0 ("L2Wrap"), so that logits do not drift out of the range of
fp16, and decay and bonus learn two and three times as fast as the rest. Models of 0.2 to 14 billion
parameters were trained.

The whole forward pass. Each block reads the residual stream x (T, C) and adds to it twice:

    x = ln0(emb[token])
    L times:
        x = x + time_mix(ln1(x))                        where tokens read the past
        x = x + channel_mix(ln2(x))                     in place of the MLP
    logits = ln_out(x) W_head

    time_mix(x), with x' the vector of the token before (at first 0):
        x_k = mix_k x + (1 - mix_k) x'                  mix_k = time_mix_k; likewise x_v, x_r
        k, v, r = x_k W_key, x_v W_value, x_r W_receptance
        y_t = (Σ_{s<t} e^(k_s + (t-1-s) w) v_s + e^(k_t + u) v_t) / (the same without v)
        return (σ(r) * y) W_output                      w = -e^time_decay, u = time_first: (C,)
    channel_mix(x), with x_k and x_r as above:
        return σ(x_r W_receptance) * (relu(x_k W_key)² W_value)

W_... are matrices, the rest vectors, multiplied channel by channel. So y_t is a weighted mean of
the values so far, in each channel: token s weighs e^(k_s), times e^w for each token between; the
current one has the bonus u. All there is to remember are x' and the two sums with their o: trained
in parallel like a Transformer, the model runs as an RNN, and a token costs the same after ten
tokens as after a million.

    B batch   T time   C channels (n_embd)   L layers   V vocabulary

References: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era";
BlinkDL/RWKV-LM@524481d RWKV-v4/src/model.py, RWKV-v4neo/src/model.py; BlinkDL/ChatRWKV@965e40b
RWKV_in_150_lines.py. On the scan: Blelloch 1990, "Prefix Sums and Their Applications". Loads and
writes the official .pth of RWKV-4; sizes are read from its shapes.

    model = RWKV4.from_pretrained("RWKV-4-Pile-169M.pth",   # or RWKV4(SIZES["169m"]), untrained
                                  eos_token_id=0)           # ends a text: files do not state it
    [new] = model.generate([[510, 3158]], 20, temperature=0.8, top_p=0.5, seed=1)
    model.save_pretrained("copy")                           # the rwkv package opens it
    tokens = torch.tensor([[510, 3158, 310, 247]])          # (B, T); to train on them:
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


@dataclass(frozen=True)
class RWKV4Config:
    """Sizes of an RWKV-4. Official files do not state them: they are read from the shapes."""
    vocab_size: int = 50277
    n_embd: int = 768
    n_layer: int = 12
    dim_ffn: int = 3072
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    context = None                           # the longest sequence, in tokens: there is no limit

    def __post_init__(self):
        for name in ("vocab_size", "n_embd", "n_layer", "dim_ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "RWKV4Config":
        """RWKV-4 of this depth and width, `dim_ffn` four times the width; `context` is not used."""
        return cls(vocab_size, width, layers, dim_ffn=4 * width)


SIZES = {                                    # 0 ends a text in both vocabularies, Pile and World
    "169m": RWKV4Config(eos_token_id=0),                                        # 169,342,464
    "430m": RWKV4Config(50277, 1024, 24, 4096, eos_token_id=0),                 # 430,397,440
    "1.5b": RWKV4Config(50277, 2048, 24, 8192, eos_token_id=0),                 # 1,515,106,304
    "3b": RWKV4Config(50277, 2560, 32, 10240, eos_token_id=0),                  # 2,984,627,200
    "7b": RWKV4Config(50277, 4096, 32, 16384, eos_token_id=0),                  # 7,392,649,216
    "14b": RWKV4Config(50277, 5120, 40, 20480, eos_token_id=0),                 # 14,148,597,760
    "world-0.1b": RWKV4Config(65536, 768, 12, 3072, eos_token_id=0),            # 192,780,288
    "world-0.4b": RWKV4Config(65536, 1024, 24, 4096, eos_token_id=0),           # 461,647,872
    "world-1.5b": RWKV4Config(65536, 2048, 24, 8192, eos_token_id=0),           # 1,577,607,168
    "world-3b": RWKV4Config(65536, 2560, 32, 10240, eos_token_id=0),            # 3,062,753,280
    "world-7b": RWKV4Config(65536, 4096, 32, 16384, eos_token_id=0),            # 7,517,650,944
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


def wkv4_loop(k: Tensor, v: Tensor, w: Tensor, u: Tensor, S0: Tensor) -> tuple[Tensor, Tensor]:
    """What time mixing computes of k, v: (B, T, C), token by token. It defines `wkv4`.

    w <= 0, the log of the decay, and u, the bonus of the current token: (C,). S0: (B, 3, C), the
    state to begin with. Returns y: (B, T, C) and the state after the last token. It holds p and q,
    the sums with and without v, both divided by e^o, o the largest exponent in them: dividing both
    by one number does not change y, and no exponent in the code is above 0: nothing overflows.
    """
    (p, q, o), y = S0.unbind(1), []
    for t in range(k.shape[1]):
        m = torch.maximum(o, u + k[:, t])
        past, now = (o - m).exp(), (u + k[:, t] - m).exp()
        y.append((past * p + now * v[:, t]) / (past * q + now))
        m = torch.maximum(o + w, k[:, t])
        past, now = (o + w - m).exp(), (k[:, t] - m).exp()
        p, q, o = past * p + now * v[:, t], past * q + now, m
    return torch.stack(y, 1), torch.stack([p, q, o], 1)


def wkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, S0: Tensor) -> tuple[Tensor, Tensor]:
    """`wkv4_loop` for all tokens at once, in fp32 (or fp64), as all official kernels compute it.

    First o for every token, a running maximum, which needs no exponential. From each o to the next,
    p and q shrink by a factor <= 1; they are sums with that factor as decay.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v, w, u, S0 = (x.to(dtype) for x in (k, v, w, u, S0))
    with torch.no_grad():                    # y does not depend on o: no gradient
        o = highest(torch.cat([S0[:, None, 2], k], 1), w)               # (B, 1 + T, C)
        m = torch.maximum(o[:, :-1], u + k)
    decay = F.pad((o[:, :-1] - o[:, 1:] + w).exp(), (0, 0, 1, 0))       # from each o to the next
    now = (k - o[:, 1:]).exp()
    new = torch.stack([now * v, now], 2)                                # (B, T, 2, C)
    S = sums(torch.cat([S0[:, None, :2], new], 1), decay[:, :, None])
    p, q = S[:, :-1].unbind(2)                                          # before each token
    past, now = (o[:, :-1] - m).exp(), (u + k - m).exp()
    y = (past * p + now * v) / (past * q + now)
    return y, torch.cat([S[:, -1], o[:, -1:]], 1)


def highest(o: Tensor, w: Tensor) -> Tensor:
    """o_t <- max(o_t, o_{t-1} + w) along (B, T, C): `span`, how far back o has read, doubles."""
    span = 1
    while span < o.shape[1]:
        o = torch.cat([o[:, :span], torch.maximum(o[:, span:], o[:, :-span] + span * w)], 1)
        span *= 2
    return o


def sums(x: Tensor, decay: Tensor) -> Tensor:
    """x_t <- x_t + decay_t x_{t-1} in turn along (B, T, 2, C), in 2 log T steps.

    Two neighbours are one step with the product of their decays. So half as many steps, done the
    same way, give every second result; one more step from each gives those in between.
    """
    T = x.shape[1]
    if T == 1:
        return x
    x, decay = (F.pad(z, (0, 0, 0, 0, 0, T % 2)) for z in (x, decay))
    (x0, x1), (decay0, decay1) = ((z[:, ::2], z[:, 1::2]) for z in (x, decay))
    x1 = sums(x1 + decay1 * x0, decay1 * decay0)
    x0 = x0 + decay0 * F.pad(x1, (0, 0, 0, 0, 1, -1))
    return torch.stack([x0, x1], 2).flatten(1, 2)[:, :T]


class TimeMix(nn.Module):
    """What attention is elsewhere: tokens read the past, here as one weighted mean per channel."""

    def __init__(self, config: RWKV4Config):
        super().__init__()
        C = config.n_embd
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))            # mix_k: share of this token
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))            # mix_v
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))            # mix_r
        self.time_decay = nn.Parameter(torch.empty(C))                  # log(-w)
        self.time_first = nn.Parameter(torch.empty(C))                  # u
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)

    def first_state(self, batch_size: int) -> Tensor:
        """p, q, o before the first token, (B, 3, C) fp32: empty sums, o below every exponent."""
        empty = torch.tensor([0.0, 0.0, -1e38], dtype=torch.float32, device=self.time_decay.device)
        return empty[:, None].expand(batch_size, 3, len(self.time_decay))

    def forward(self, x, last, S):
        gap = previous(x, last) - x                         # x_k = x + (1 - mix_k) gap: (B, T, C)
        r = torch.sigmoid(self.receptance(x + gap * (1 - self.time_mix_r)))
        k = self.key(x + gap * (1 - self.time_mix_k))
        v = self.value(x + gap * (1 - self.time_mix_v))
        w = -torch.exp(self.time_decay.float())             # fp32: its error adds up over time
        S0 = self.first_state(len(x)) if S is None else S.clone()       # S is overwritten below
        y, S1 = wkv4(k, v, w, self.time_first, S0)
        if S is not None:
            S.copy_(S1.detach())
        return self.output(r * y.to(r.dtype))


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between them, behind a gate."""

    def __init__(self, config: RWKV4Config):
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

    def __init__(self, config: RWKV4Config, first: bool):
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
    """What a batch remembers, updated in place: five vectors per layer, in fp32."""
    position: Tensor                         # (B,) int64: number of tokens seen, row by row
    att_x: Tensor                            # (B, L, C): the last input of time mixing
    ffn_x: Tensor                            # (B, L, C): the last input of channel mixing
    wkv: Tensor                              # (B, L, 3, C): p, q, o of `wkv4_loop`
    capacity = math.inf                      # the number of tokens that fit


class RWKV4(nn.Module):
    """RWKV-4: (B, T) tokens -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.99), eps=1e-8)
    L2WRAP = 1e-4                            # penalty on the largest logits, which train.py adds

    def __init__(self, config: RWKV4Config):
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
        wave = 0.5 * ((h + 1) % 3 - 1)
        nn.init.orthogonal_(self.emb.weight, gain=1e-4 * max(V, C) ** 0.5)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(V / C, 1) ** 0.5)
        for i, block in enumerate(self.blocks):
            depth = i / max(L - 1, 1)                                   # 0 to 1 over the layers
            mix = (h / C) ** (1 - i / L)
            att, ffn = block.att, block.ffn
            for parameter, value in (
                    (att.time_mix_k, mix), (att.time_mix_v, mix + 0.3 * depth),
                    (att.time_mix_r, mix ** 0.5),
                    (att.time_decay, -5 + 8 * ramp ** (0.7 + 1.3 * depth)),
                    (att.time_first, math.log(0.3) + wave),
                    (ffn.time_mix_k, mix), (ffn.time_mix_r, mix)):
                parameter.copy_(value)
            for matrix in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
                matrix.weight.zero_()
            for matrix in (att.value, ffn.key):
                rows, columns = matrix.weight.shape
                nn.init.orthogonal_(matrix.weight, gain=max(rows / columns, 1) ** 0.5)

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
        wkv = torch.stack([block.att.first_state(batch_size) for block in self.blocks], 1)
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
                        dtype: torch.dtype | None = None, **overrides) -> "RWKV4":
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
        config = {"architectures": ["RWKV4"], "model_type": "rwkv4", "tie_word_embeddings": False,
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

def read_pth(path: Path) -> tuple[RWKV4Config, dict[str, Tensor]]:
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
    if tensors["blocks.0.att.time_decay"].shape == (C, 1):              # (C,) in RWKV-4
        raise ValueError(f"{path} is an RWKV-3: it has the same names, but time_decay is (C, 1)")
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    sizes = dict(vocab_size=V, n_embd=C, n_layer=len(layers),
                 dim_ffn=len(tensors["blocks.0.ffn.key.weight"]))
    known = {field.name: stated[field.name] for field in fields(RWKV4Config)
             if stated.get(field.name) is not None}
    return RWKV4Config(**{**known, **sizes}), tensors                   # shapes win
