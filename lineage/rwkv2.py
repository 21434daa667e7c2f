"""RWKV-2 in one file: a language model without attention.

In GPT-2 each token weighs all tokens before it, pair by pair. Here it reads a weighted mean of
their values, in which the past fades at a rate that is learned for each channel. Two running sums
and the token before are all there is to remember: trained in parallel like a Transformer, the model
runs as an RNN, and a token costs the same after ten tokens as after a million; no positions, no
limit to the context.

The whole forward pass. Each block norms the residual stream x (T, C) and adds to it, twice:

    x = emb[token]
    L times:
        x = ln1(x);  x = x + time_mix(x)                where tokens read the past
        x = ln2(x);  x = x + channel_mix(x)             in place of the MLP
    logits = ln_out(x) W_head

    time_mix(x), with x' the vector of the token before (at first 0):
        z = mix x + (1 - mix) x'                        mix = time_mix: (C,)
        k, v, r = min(z W_key, 60), z W_value, z W_receptance
        y_t = (Σ_{s<t} e^(k_s + (t-1-s) w) v_s + e^(k_t + u) v_t) / (the same without v, + ε)
        return (σ(r) * y) W_output                      w = -e^time_decay, u = time_first: (C,)
    channel_mix(x), z as above with a mix of its own:
        return σ(z W_receptance) * (relu(z W_key)² W_value)

W_... are matrices, the rest vectors, multiplied channel by channel; the name is that of four of
them: receptance (a gate), w (the log of the decay), key and value. Token s weighs e^(k_s), times
e^w for each token between; the current one has the bonus u. Beyond 60, e^k could overflow; ε is
against 0 / 0. Also different from GPT-2: the matrices read a blend of this token and the one before
("token shift"), the residual stream itself is normed, not what is read from it, the MLP is a
squared ReLU behind a gate, only norms have biases, and the head is a matrix of its own.

headQK, an option that the first published model has, helps to copy names: with h = ln_out(x), it
adds head_q(h_t) · head_k(h_s) / D, at position t, to the logit of the token that stands at s <= t.

    B batch   T time   C channels (n_embd)   L layers   V vocabulary
    M state capacity in tokens, with headQK only; D its key size (head_qk)

References: Zhai et al. 2021, "An Attention Free Transformer", whose weights e^(k_s) these are;
BlinkDL/RWKV-LM@524481d RWKV-v2-RNN/src/model.py; BlinkDL/RWKV-v2-RNN-Pile@32c282a
RWKV-v2/src/model.py. On the scan: Blelloch 1990, "Prefix Sums and Their Applications". Loads and
writes the official .pth of RWKV-2; sizes are read from its shapes.

    model = RWKV2.from_pretrained("RWKV-2-Pile-430M.pth",   # or RWKV2(SIZES["430m"]), untrained
                                  eos_token_id=0)           # ends a text: files do not state it
    [new] = model.generate([[510, 3158]], 20, temperature=0.8, top_p=0.5, seed=1)
    model.save_pretrained("copy")                           # the official code opens it
    tokens = torch.tensor([[510, 3158, 310, 247]])          # (B, T); to train on them:
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.optim.AdamW(model.parameter_groups(weight_decay=0.0), **model.OPTIMIZER).step()
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
class RWKV2Config:
    """Sizes of an RWKV-2. Official files do not state them: they are read from the shapes."""
    vocab_size: int = 50277
    n_embd: int = 1024
    n_layer: int = 24
    dim_ffn: int = 4096
    k_clamp: float = 60.0                    # larger k are cut off: e^k must not overflow
    k_eps: float = 1e-9                      # ε, against 0 / 0; 1e-16 in the code with headQK
    head_qk: int = 0                         # key size of headQK; 0: none
    ctx_len: int = 1024                      # how far back headQK looks; nothing else has a limit
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    context = None                           # the longest sequence, in tokens: there is no limit

    def __post_init__(self):
        for name in ("vocab_size", "n_embd", "n_layer", "dim_ffn", "ctx_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.head_qk < 0 or not 0 < self.k_clamp <= 80 or not 0 < self.k_eps <= 1:
            raise ValueError(f"head_qk {self.head_qk} must not be negative, k_clamp {self.k_clamp} "
                             f"in (0, 80] (fp32 ends at e^88), k_eps {self.k_eps} in (0, 1]")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "RWKV2Config":
        """RWKV-2 of this depth and width, `dim_ffn` four times the width; `context` is not used."""
        return cls(vocab_size, width, layers, dim_ffn=4 * width)


SIZES = {
    "enwik8": RWKV2Config(6064, 512, 6, 2048, k_eps=1e-16, head_qk=256),        # 26,944,512
    "430m": RWKV2Config(eos_token_id=0),                                        # 430,321,664
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


def wkv2_loop(k: Tensor, v: Tensor, w: Tensor, u: Tensor, S0: Tensor,
              eps: float) -> tuple[Tensor, Tensor]:
    """What time mixing computes of k, v: (B, T, C), token by token. It defines `wkv2`.

    w <= 0, the log of the decay, and u, the bonus of the current token: (C,). S0: (B, 2, C), the
    state to begin with. Returns y: (B, T, C) and the state after the last token. It holds p and q,
    the sums with and without v.
    """
    (p, q), y = S0.unbind(1), []
    for t in range(k.shape[1]):
        new, now = k[:, t].exp(), (u + k[:, t]).exp()
        y.append((p + now * v[:, t]) / (q + now + eps))
        p, q = w.exp() * p + new * v[:, t], w.exp() * q + new
    return torch.stack(y, 1), torch.stack([p, q], 1)


def wkv2(k: Tensor, v: Tensor, w: Tensor, u: Tensor, S0: Tensor,
         eps: float) -> tuple[Tensor, Tensor]:
    """`wkv2_loop` for all tokens at once, in fp32 (or fp64), as all official kernels compute it."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v, w, u, S0 = (x.to(dtype) for x in (k, v, w, u, S0))
    new = k.exp()
    now = u.exp() * new
    S = torch.cat([S0[:, None], torch.stack([new * v, new], 2)], 1)     # (B, 1 + T, 2, C)
    S = sums(S, w)
    p, q = S[:, :-1].unbind(2)                                          # before each token
    return (p + now * v) / (q + now + eps), S[:, -1]


def sums(x: Tensor, w: Tensor) -> Tensor:
    """x_t += e^w x_{t-1}, for t = 1, 2, ... in turn, along (B, T, 2, C), in about 2 log T steps.

    Two neighbours are one step with decay e^(2 w). So half as many steps, done the same way, give
    every second result; one more step from each gives those in between.
    """
    T = x.shape[1]
    if T == 1:
        return x
    x, decay = F.pad(x, (0, 0, 0, 0, 0, T % 2)), w.exp()
    x0, x1 = x[:, ::2], x[:, 1::2]
    x1 = sums(x1 + decay * x0, 2 * w)
    x0 = x0 + decay * F.pad(x1, (0, 0, 0, 0, 1, -1))
    return torch.stack([x0, x1], 2).flatten(1, 2)[:, :T]


class TimeMix(nn.Module):
    """What attention is elsewhere: tokens read the past, here as one weighted mean per channel."""

    def __init__(self, config: RWKV2Config):
        super().__init__()
        C = config.n_embd
        self.clamp, self.eps = config.k_clamp, config.k_eps
        self.time_mix = nn.Parameter(torch.empty(1, 1, C))              # mix: share of this token
        self.time_decay = nn.Parameter(torch.empty(C, 1))               # log(-w)
        self.time_first = nn.Parameter(torch.empty(C, 1))               # u
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)

    def forward(self, x, last, S):
        z = self.time_mix * x + (1 - self.time_mix) * previous(x, last) # (B, T, C)
        r = torch.sigmoid(self.receptance(z))
        k = self.key(z).clamp(max=self.clamp)
        v = self.value(z)
        w = -torch.exp(self.time_decay[:, 0].float())       # fp32: its error adds up over time
        u = self.time_first[:, 0]
        S0 = k.new_zeros(len(k), 2, len(w)) if S is None else S.clone()     # S is overwritten below
        y, S1 = wkv2(k, v, w, u, S0, self.eps)
        if S is not None:
            S.copy_(S1.detach())
        return self.output(r * y.to(r.dtype))


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between them, behind a gate."""

    def __init__(self, config: RWKV2Config):
        super().__init__()
        C = config.n_embd
        self.time_mix = nn.Parameter(torch.empty(1, 1, C))              # mix
        self.key = nn.Linear(C, config.dim_ffn, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(config.dim_ffn, C, bias=False)

    def forward(self, x, last):
        z = self.time_mix * x + (1 - self.time_mix) * previous(x, last) # (B, T, C)
        k = F.relu(self.key(z)) ** 2                                    # (B, T, dim_ffn)
        return torch.sigmoid(self.receptance(z)) * self.value(k)


class Block(nn.Module):
    """Time mixing, then channel mixing: each norms the residual stream, reads it and adds to it."""

    def __init__(self, config: RWKV2Config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.n_embd)                          # eps 1e-5 in all of them
        self.ln2 = nn.LayerNorm(config.n_embd)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)

    def forward(self, x, att_x=None, ffn_x=None, wkv=None):
        x = self.ln1(x)
        x = x + self.att(x, att_x, wkv)
        x = self.ln2(x)
        return x + self.ffn(x, ffn_x)


class State(NamedTuple):
    """What a batch remembers, updated in place: four vectors per layer, in fp32.

    headQK remembers more: the key of each token, in the parameters' dtype. Without it, M is 0.
    """
    position: Tensor                         # (B,) int64: number of tokens seen, row by row
    att_x: Tensor                            # (B, L, C): the last input of time mixing
    ffn_x: Tensor                            # (B, L, C): the last input of channel mixing
    wkv: Tensor                              # (B, L, 2, C): p, q of `wkv2_loop`
    head_k: Tensor                           # (B, M, D): keys of headQK
    ids: Tensor                              # (B, M) int64: the tokens they belong to

    capacity = property(lambda self: self.ids.shape[1] or math.inf, doc="The tokens that fit.")


class RWKV2(nn.Module):
    """RWKV-2: (B, T) tokens -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.99), eps=4e-9)

    def __init__(self, config: RWKV2Config):
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_out = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.head_qk:
            self.head_q = nn.Linear(config.n_embd, config.head_qk, bias=False)
            self.head_k = nn.Linear(config.n_embd, config.head_qk, bias=False)
        if not self.head.weight.is_meta:     # on meta, drawing takes seconds
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """The authors' values (src/model.py): vectors by depth and channel, matrices orthogonal."""
        L, C, V = self.config.n_layer, self.config.n_embd, self.config.vocab_size
        h = torch.arange(C)
        ramp = h / max(C - 1, 1)                                        # 0 to 1 over the channels
        nn.init.orthogonal_(self.emb.weight, gain=1e-4 * max(V, C) ** 0.5)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(V / C, 1) ** 0.5)
        if self.config.head_qk:
            self.head_q.weight.zero_()
            nn.init.orthogonal_(self.head_k.weight, 0.1 * max(self.config.head_qk / C, 1) ** 0.5)
        for i, block in enumerate(self.blocks):
            depth = (i - 1) / max(L - 2, 1)                 # 0 in layer 1, to 1 in the last one
            fastest = 3.0 - 1.8 * depth + (0.5 if i == 1 else 0.0)      # -w of the first channel
            ratio = 0.37 if i == L - 1 else 0.4 if i == L - 2 else 0.65 - 0.25 * depth
            mix = (h >= C // 2).float()
            att, ffn = block.att, block.ffn
            for parameter, value in (
                    (att.time_mix, mix),
                    (att.time_decay, (fastest * ratio ** (7 * ramp)).log()[:, None]),
                    (att.time_first, torch.tensor(math.log(0.3))),
                    (ffn.time_mix, mix)):
                parameter.copy_(value)
            for matrix in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
                matrix.weight.zero_()
            for matrix in (att.value, ffn.key):
                rows, columns = matrix.weight.shape
                nn.init.orthogonal_(matrix.weight, gain=max(rows / columns, 1) ** 0.5)

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) after the final norm.

        With a state, the tokens continue the sequence that it has seen, and it advances by T.
        ValueError if they do not fit, which only headQK requires.
        """
        if state is not None and len(state.position) != len(tokens):
            raise ValueError(f"{len(tokens)} rows of tokens, but a state of {len(state.position)}")
        copying = state is not None and self.config.head_qk > 0
        if copying and not torch.compiler.is_compiling():   # this forces a GPU synchronisation
            end = int(state.position.max()) + tokens.shape[1]
            if end > state.capacity:
                raise ValueError(f"{end} tokens do not fit: the state holds {state.capacity}")
        x = self.emb(tokens)                                            # (B, T, C)
        for i, block in enumerate(self.blocks):
            past = () if state is None else (state.att_x[:, i], state.ffn_x[:, i], state.wkv[:, i])
            x = block(x, *past)
        x = self.ln_out(x)
        if copying:
            k = self.head_k(x).detach().to(state.head_k.dtype)          # (B, T, D)
            positions = state.position[:, None] + torch.arange(k.shape[1], device=k.device)
            state.head_k.scatter_(1, positions[..., None].expand_as(k), k)
            state.ids.scatter_(1, positions, tokens)
        if state is not None:
            state.position.add_(tokens.shape[1])
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V): the head. ValueError with headQK, which reads the tokens too."""
        if self.config.head_qk:
            raise ValueError("headQK needs the tokens, not only their hidden vectors: call the "
                             "model itself")
        return self.head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None, last: bool = False) -> Tensor:
        """(B, T) tokens -> (B, T, V): logits of every position, or (B, 1, V) of the last one."""
        hidden = self.hidden(tokens, state)
        logits = self.head(hidden[:, -1:] if last else hidden)
        return self.copied(logits, hidden, tokens, state) if self.config.head_qk else logits

    def copied(self, logits: Tensor, hidden: Tensor, tokens: Tensor, state: State | None) -> Tensor:
        """headQK: logits (B, T or 1, V), plus the score of each token seen on the logit of its own.

        A position sees itself and the tokens before it, ctx_len in all; there is no softmax.
        """
        q, k = self.head_q(hidden[:, -logits.shape[1]:]), self.head_k(hidden)
        steps = torch.arange(k.shape[1], device=k.device)
        positions, ids = steps[None], tokens                            # (1, T), (B, T)
        if state is not None:                # earlier keys are constants: gradients reach new ones
            positions = state.position[:, None] - len(steps) + steps    # (B, T)
            k = state.head_k.to(k.dtype).scatter(1, positions[..., None].expand_as(k), k)
            ids = state.ids.clone()          # autograd keeps it, and the state is overwritten
        ago = positions[:, -q.shape[1]:, None] - torch.arange(k.shape[1], device=k.device)
        unseen = (ago < 0) | (ago >= self.config.ctx_len)
        scores = (q @ k.mT / q.shape[-1]).masked_fill(unseen, 0.0)      # (B, T or 1, T or M)
        return logits.scatter_add(2, ids[:, None].expand_as(scores), scores.to(logits.dtype))

    def new_state(self, batch_size: int, max_tokens: int | None = None) -> State:
        """An empty state for `batch_size` rows; `max_tokens` is a limit only with headQK."""
        c, like = self.config, self.emb.weight
        last = like.new_zeros(batch_size, c.n_layer, c.n_embd, dtype=torch.float32)
        capacity = (max_tokens or c.ctx_len) if c.head_qk else 0
        return State(like.new_zeros(batch_size, dtype=torch.int64), last, last.clone(),
                     last.new_zeros(batch_size, c.n_layer, 2, c.n_embd),
                     like.new_zeros(batch_size, capacity, c.head_qk),
                     like.new_zeros(batch_size, capacity, dtype=torch.int64))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Every parameter once, in groups for torch.optim.AdamW: as the authors, without decay.

        Two keys are for train.py, AdamW ignores them: `lr_scale`, a factor of the learning rate,
        and `hidden_matrix`, true for the 2-D matrices inside the blocks.
        """
        matrices, others = [], []
        for name, p in self.named_parameters():
            matrix = name.startswith("blocks.") and name.endswith(".weight") and p.dim() == 2
            (matrices if matrix else others).append(p)
        return [dict(params=matrices, weight_decay=0.0, lr_scale=1.0, hidden_matrix=True),
                dict(params=others, weight_decay=0.0, lr_scale=1.0, hidden_matrix=False)]

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
                        dtype: torch.dtype | None = None, **overrides) -> "RWKV2":
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
        config = {"architectures": ["RWKV2"], "model_type": "rwkv2", "tie_word_embeddings": False,
                  "torch_dtype": dtype, "dtype": dtype, "hidden_size": self.config.n_embd,
                  "num_hidden_layers": self.config.n_layer,
                  **asdict(self.config)}
        tensors = dict(self.state_dict())
        if self.config.head_qk:              # the official code saves its mask of positions too
            tensors["copy_mask"] = self.emb.weight.new_ones(2 * [self.config.ctx_len]).tril()
        torch.save(tensors, f"{weights}.part")
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

def read_pth(path: Path) -> tuple[RWKV2Config, dict[str, Tensor]]:
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
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    sizes = dict(vocab_size=V, n_embd=C, n_layer=len(layers),
                 dim_ffn=len(tensors["blocks.0.ffn.key.weight"]))
    if "head_q.weight" in tensors:           # then made by RWKV-LM, whose k_eps is another
        sizes.update(head_qk=len(tensors["head_q.weight"]))
        stated.setdefault("k_eps", 1e-16)
        if "copy_mask" in tensors:
            sizes.update(ctx_len=len(tensors.pop("copy_mask")))
    known = {field.name: stated[field.name] for field in fields(RWKV2Config)
             if stated.get(field.name) is not None}
    return RWKV2Config(**{**known, **sizes}), tensors                   # shapes win
