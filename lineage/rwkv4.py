"""RWKV-4 in one file: build it, train it, load the published weights, generate.

A stack of blocks that read one residual stream and add to it:

    x = ln0(emb[token])
    each block:  x += time_mix(ln1(x));  x += channel_mix(ln2(x))
    logits = head(ln_out(x))

Trained in parallel like a Transformer, it runs as an RNN. As in RWKV-3, a token reads, in each
channel, a mean of all values so far: token s weighs e^(k_s), which fades by e^w with each step:

    y_t = (sum of e^(k_s + (t-1-s) w) v_s over s < t, + e^(u + k_t) v_t) / (the same without v)

What changed from RWKV-3, and why:

* the mean is exact for any k. RWKV-3 cut k at 60, or e^k would overflow, and added a small number
  to the denominator, or 0 / 0 would be possible: where all k are low, that number pulled the mean
  to 0. Here both sums are kept relative to e^o, o the largest exponent in them so far;
* so the state has a third vector, o, and fp16 or bf16 is enough for the weights: models of up to
  14 billion parameters were trained;
* training pulls the largest logit of each position to 0, a little ("L2Wrap"), against logits that
  drift out of the range of such dtypes;
* decay and bonus learn faster than the rest (twice and three times the rate).

    B batch   T time   C channels (n_embd)   L layers   V vocabulary

References: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era";
BlinkDL/RWKV-LM@524481d RWKV-v4/src/model.py, RWKV-v4neo/src/model.py; BlinkDL/ChatRWKV@965e40b
RWKV_in_150_lines.py. On the scan: Blelloch 1990, "Prefix Sums and Their Applications".

Loads and writes the official .pth of RWKV-4, a folder or the file alone; sizes are read from it.

    model = RWKV4.from_pretrained("RWKV-4-Pile-169M.pth")       # or RWKV4(SIZES["169m"]), untrained
    logits = model(torch.tensor([[510, 3158]]))                 # (B, T) ids -> (B, T, V)
    [new] = model.generate([[510, 3158]], 20, temperature=0.8, top_p=0.5, seed=1)
    model.save_pretrained("copy")                               # the rwkv package opens it
"""
import argparse
import contextlib
import itertools
import json
import math
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


@dataclass(frozen=True)
class RWKV4Config:
    """Sizes of an RWKV-4. Its checkpoints state none: they are read from the tensors' shapes."""
    vocab_size: int = 50277
    n_embd: int = 768
    n_layer: int = 12
    dim_ffn: int = 3072
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "n_embd", "n_layer", "dim_ffn"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")

    @property
    def context(self) -> None:
        """The most ids that the model can see: no limit."""
        return None

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "RWKV4Config":
        """RWKV-4 of this depth and width: an MLP four times as wide.

        The context is no size of this model.
        """
        return cls(vocab_size, width, layers, 4 * width)


END = dict(eos_ids=(0,))                     # ends a text, in both vocabularies
SIZES = {
    "169m": RWKV4Config(**END),                                                 # 169,342,464
    "430m": RWKV4Config(50277, 1024, 24, 4096, **END),                          # 430,397,440
    "1.5b": RWKV4Config(50277, 2048, 24, 8192, **END),                          # 1,515,106,304
    "3b": RWKV4Config(50277, 2560, 32, 10240, **END),                           # 2,984,627,200
    "7b": RWKV4Config(50277, 4096, 32, 16384, **END),                           # 7,392,649,216
    "14b": RWKV4Config(50277, 5120, 40, 20480, **END),                          # 14,148,597,760
    "world-0.1b": RWKV4Config(65536, 768, 12, 3072, **END),                     # 192,780,288
    "world-0.4b": RWKV4Config(65536, 1024, 24, 4096, **END),                    # 461,647,872
    "world-1.5b": RWKV4Config(65536, 2048, 24, 8192, **END),                    # 1,577,607,168
    "world-3b": RWKV4Config(65536, 2560, 32, 10240, **END),                     # 3,062,753,280
    "world-7b": RWKV4Config(65536, 4096, 32, 16384, **END),                     # 7,517,650,944
}


@dataclass
class State:
    """What a batch remembers: for every layer, five vectors in fp32."""
    position: Tensor                         # (B,) int64: how many ids each row has seen
    att_x: Tensor                            # (B, L, C): the last input of time mixing
    ffn_x: Tensor                            # (B, L, C): the last input of channel mixing
    wkv: Tensor                              # (B, L, 3, C): the sums p, q, times e^o

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


def wkv4(k: Tensor, v: Tensor, w: Tensor, u: Tensor, S0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence, all of it at once; for each channel and position t:

        m = max(o, u + k_t);  y_t = (e^(o-m) p + e^(u+k_t-m) v_t) / (e^(o-m) q + e^(u+k_t-m))
        m = max(o + w, k_t);  p <- e^(o+w-m) p + e^(k_t-m) v_t
                              q <- e^(o+w-m) q + e^(k_t-m);  o <- m

    k, v: (B, T, C); w <= 0, the log of the decay, and u, bonus of the current token: (C,); S0:
    (B, 3, C), the p, q, o to begin with. Returns y: (B, T, C) and the last p, q, o. Nothing
    overflows: no exponent is above 0. In fp32 (or fp64), as all official kernels compute it. To
    autograd o is a constant, since another o, with p and q to match, would change no y.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    k, v, w, u, S0 = (x.to(dtype) for x in (k, v, w, u, S0))
    device = k.device.type                   # "meta" has no autocast to turn off
    with (torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device)
          else contextlib.nullcontext()):
        with torch.no_grad():
            o = highest(torch.cat([S0[:, None, 2], k], 1), w)           # (B, 1 + T, C)
            m = torch.maximum(o[:, :-1], u + k)
        decay = F.pad((o[:, :-1] - o[:, 1:] + w).exp(), (0, 0, 1, 0))   # from each o to the next
        e = (k - o[:, 1:]).exp()
        new = torch.stack([e * v, e], 2)                                # (B, T, 2, C)
        S = sums(torch.cat([S0[:, None, :2], new], 1), decay[:, :, None])
        p, q = S[:, :-1].unbind(2)                                      # before each token
        past, now = (o[:, :-1] - m).exp(), (u + k - m).exp()
        y = (past * p + now * v) / (past * q + now)
    return y, torch.cat([S[:, -1], o[:, -1:]], 1)


def highest(o: Tensor, w: Tensor) -> Tensor:
    """o_t <- max(o_t, o_(t-1) + w) along (B, T, C): spans double until they reach the beginning."""
    span = 1
    while span < o.shape[1]:
        o = torch.cat([o[:, :span], torch.maximum(o[:, span:], o[:, :-span] + span * w)], 1)
        span *= 2
    return o


def sums(x: Tensor, decay: Tensor) -> Tensor:
    """x_t <- x_t + decay_t x_(t-1) along (B, T, 2, C): a scan of log T steps, 2 T sums in all.

    Neighbours are joined, the pairs summed up by the same scan; what ends between pairs is added.
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
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))            # mix: the share of this
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))            # token in what each matrix
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))            # reads
        self.time_decay = nn.Parameter(torch.empty(C))                  # log(-w)
        self.time_first = nn.Parameter(torch.empty(C))                  # u: bonus of the newest
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)

    def first_state(self, batch_size: int) -> Tensor:
        """p, q, o before the first token, (B, 3, C) fp32: sums of nothing, below any exponent."""
        nothing = self.time_decay.new_tensor([0.0, 0.0, -1e38], dtype=torch.float32)
        return nothing[:, None].expand(batch_size, 3, len(self.time_decay))

    def blends(self, x, last):
        """What k, v and r read, (B, T, C) each: blends of x and its predecessor."""
        gap = previous(x, last) - x
        return [x + gap * (1 - getattr(self, f"time_mix_{name}")) for name in "kvr"]

    def forward(self, x, last, S):
        xk, xv, xr = self.blends(x, last)
        w = -torch.exp(self.time_decay.float())                 # bf16 cannot tell 0.999 from 1
        r, k, v = torch.sigmoid(self.receptance(xr)), self.key(xk), self.value(xv)
        S0 = self.first_state(len(x)) if S is None else S.clone() if torch.is_grad_enabled() else S
        y, end = wkv4(k, v, w, self.time_first, S0)
        if S is not None:
            S.copy_(end.detach())
        return self.output(r * y.to(r.dtype))


class ChannelMix(nn.Module):
    """Two matrices with a squared ReLU between them, behind a gate."""

    def __init__(self, config: RWKV4Config):
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

    def __init__(self, config: RWKV4Config, first: bool):
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


class RWKV4(nn.Module):
    """RWKV-4: (B, T) ids -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.99), eps=1e-8)
    L2WRAP = 1e-4                            # penalty on large logits; whoever trains applies it

    def __init__(self, config: RWKV4Config):
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
        ramp = h / max(C - 1, 1)                                        # 0 to 1 over the channels
        wave = 0.5 * ((h + 1) % 3 - 1)
        nn.init.orthogonal_(self.emb.weight, gain=1e-4 * max(V, C) ** 0.5)
        nn.init.orthogonal_(self.head.weight, gain=0.5 * max(V / C, 1) ** 0.5)
        for i, block in enumerate(self.blocks):
            deep = i / max(L - 1, 1)                                    # from 0 to 1
            mix = (h / C) ** (1 - i / L)
            att, ffn = block.att, block.ffn
            for parameter, value in (
                    (att.time_mix_k, mix), (att.time_mix_v, mix + 0.3 * deep),
                    (att.time_mix_r, mix ** 0.5),
                    (att.time_decay, -5 + 8 * ramp ** (0.7 + 1.3 * deep)),
                    (att.time_first, math.log(0.3) + wave),
                    (ffn.time_mix_k, mix), (ffn.time_mix_r, mix)):
                parameter.copy_(value)
            for zero in (att.key, att.receptance, att.output, ffn.value, ffn.receptance):
                zero.weight.zero_()
            for matrix in (att.value, ffn.key):
                rows, columns = matrix.weight.shape
                nn.init.orthogonal_(matrix.weight, gain=max(rows / columns, 1) ** 0.5)

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
        """Parameters for the optimiser, as the authors (v4neo): matrices decay, time_decay learns
        twice as fast and time_first three times."""
        groups = {(1.0, True): [], (2.0, False): [], (3.0, False): [], (1.0, False): []}
        for name, p in self.named_parameters():
            matrix = name.endswith(".weight") and p.dim() > 1
            lr_scale = {"time_decay": 2.0, "time_first": 3.0}.get(name.split(".")[-1], 1.0)
            groups[lr_scale, matrix].append(p)
        return [{"params": params, "lr_scale": lr_scale, "decay": decay}
                for (lr_scale, decay), params in groups.items()]

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu",
                        dtype: torch.dtype | None = None, **overrides) -> "RWKV4":
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
            raise ValueError(f"RWKV4Config has no field {', '.join(sorted(unknown))}")
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
    """The sizes in RWKV4Config that shapes tell; ValueError if they are of another model."""
    found = version(tensors)
    if found != "an RWKV-4":
        raise ValueError(f"{path} is {found}: only RWKV-4 is supported")
    try:
        vocab_size, n_embd = tensors["emb.weight"].shape
        return dict(
            vocab_size=vocab_size, n_embd=n_embd,
            n_layer=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
            dim_ffn=tensors["blocks.0.ffn.key.weight"].shape[0])
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is {found} of which parts are missing: {error}") from None


def read_config(path: Path) -> RWKV4Config:
    """What a config.json adds, if there is one: the special ids."""
    stated = read_json(path) if path.exists() else {}
    if stated.get("model_type", "rwkv4") != "rwkv4":
        raise ValueError(f"{path} says model_type = {stated['model_type']!r}: only 'rwkv4' is "
                         "supported")
    eos = stated.get("eos_token_id")
    return RWKV4Config(
        bos_id=stated.get("bos_token_id"), pad_id=stated.get("pad_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def published_config(config: RWKV4Config, dtype: torch.dtype) -> dict:
    """What config.json says of a model whose weights have this dtype: what shapes do not tell."""
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"architectures": ["RWKV4"], "model_type": "rwkv4", "tie_word_embeddings": False,
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
        model = RWKV4.from_pretrained(args.weights, device, getattr(torch, args.dtype or "", None))
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
