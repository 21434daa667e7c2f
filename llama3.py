"""Llama 3, 3.1 and 3.2 in one file: build, train, load the published weights, generate.

The whole forward pass. Each block reads the residual stream x (T, C) and adds to it twice:

    x = embed_tokens[token]
    L times:
        q, k, v = rotate(h W_q), rotate(h W_k), h W_v   h = norm(x); H heads of q, K of k and v
        y = softmax(q kᵀ / √D + mask) v                 per head of q; mask: -∞ for what comes later
        x = x + concat(y) W_o                           concat: the H heads side by side again
        x = x + (SiLU(h W_gate) * h W_up) W_down        h = norm(x) again; SwiGLU, a gated MLP
    logits = norm(x) W_head

    norm(x) = x / √(mean(x²) + ε) * weight              RMSNorm, over the channels
    SiLU(x) = x / (1 + exp(-x))
    rotate, at position t, turns the values a, b of channels j, j + D/2 of a head (Meta's files
    have such a pair at 2j, 2j + 1):
        (a cos φ - b sin φ, a sin φ + b cos φ)          φ = t ω_j,  ω_j = rope_theta^(-2j/D)

What differs from GPT-2 (gpt.py):

* positions are rotations of q and k (RoPE), so only distances enter q kᵀ. 3.1 and 3.2
  slow the low frequencies, for a context of 131072 tokens instead of 8192;
* RMSNorm subtracts no mean; nothing has a bias; the MLP is gated, by a third matrix;
* the head is a matrix of its own, except in the small 3.2 models, where it is the token table;
* H/K consecutive heads of q share one head of k and v, for a smaller cache (grouped queries):

      q        0 1 2 3   4 5 6 7          H = 8
      k, v     [  0  ]   [  1  ]          K = 2

    B batch   T time   C channels (hidden_size)   H heads   K key/value heads   D head size
    L layers  V vocabulary   M cache capacity in tokens

References: Grattafiori et al. 2024, "The Llama 3 Herd of Models"; Su et al. 2021 (RoPE); Ainslie
et al. 2023 (grouped queries); Shazeer 2020 (SwiGLU); Zhang and Sennrich 2019 (RMSNorm);
meta-llama/llama3@a0940f9 llama/model.py; meta-llama/llama-models@a9c89c4 models/llama3/model.py.
Loads Meta's layout (params.json and consolidated.NN.pth, any number of shards) and Hugging Face's.

    model = Llama3.from_pretrained("path/to/Llama-3.2-1B")  # or Llama3(SIZES["llama3.2-1b"])
    [new] = model.generate([[128000, 9906]], 20, temperature=0.6, top_p=0.9, seed=1)
    model.save_pretrained("copy")                           # transformers opens it
    tokens = torch.tensor([[128000, 9906, 11, 1917]])       # "Hello, world" after the start token
    F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.optim.AdamW(model.parameter_groups(weight_decay=0.1), **model.OPTIMIZER).step()
"""
import itertools
import json
import math
import os
import re
import shutil
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Llama3Config:
    """Sizes of a Llama 3, named as in the published config.json; the default is 8B."""
    max_position_embeddings: int = 8192
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    vocab_size: int = 128256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 1.0                 # rope_scaling.factor of 3.1, 3.2; 1: none
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not bool and not name.endswith("_id") and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: it must be positive")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_key_value_heads {self.num_key_value_heads} does not divide "
                             f"num_attention_heads {self.num_attention_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs of channels")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(f"rope_high_freq_factor {self.rope_high_freq_factor} is too low")

    context = property(lambda self: self.max_position_embeddings, doc="The longest sequence.")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "Llama3Config":
        """Llama 3 of this depth and width, in the proportions of 8B: heads of about 64 channels,
        of 128 from width 3072 on, up to four to each key/value head; small ones tied, as in 3.2."""
        heads = max(1, width // (128 if width >= 3072 else 64))
        shared = min(n for n in range(1, heads + 1) if heads % n == 0 and n >= heads / 4)
        size = max(2, width // heads // 2 * 2)                          # even: RoPE has pairs
        return cls(context, width, layers, heads, shared, size, 32 * math.ceil(3.5 * width / 32),
                   vocab_size, tie_word_embeddings=width < 4096)


V3 = dict(bos_token_id=128000, eos_token_id=128001)
V31 = dict(rope_factor=8.0, **V3)
V32 = dict(rope_factor=32.0, tie_word_embeddings=True, **V3)
SIZES = {                                # context, hidden_size, layers, H, K, D, intermediate_size
    "llama3-8b": Llama3Config(8192, 4096, 32, 32, 8, 128, 14336, **V3),         # 8,030,261,248
    "llama3-70b": Llama3Config(8192, 8192, 80, 64, 8, 128, 28672, **V3),        # 70,553,706,496
    "llama3.1-8b": Llama3Config(131072, 4096, 32, 32, 8, 128, 14336, **V31),    # 8,030,261,248
    "llama3.1-70b": Llama3Config(131072, 8192, 80, 64, 8, 128, 28672, **V31),   # 70,553,706,496
    "llama3.1-405b": Llama3Config(131072, 16384, 126, 128, 8, 128, 53248, **V31),  # 405,853,388,800
    "llama3.2-1b": Llama3Config(131072, 2048, 16, 32, 8, 64, 8192, **V32),      # 1,235,814,400
    "llama3.2-3b": Llama3Config(131072, 3072, 28, 24, 8, 128, 8192, **V32),     # 3,212,749,824
}


def inverse_frequency(config: Llama3Config) -> Tensor:
    """ω: (D/2,) fp32, on the CPU, the angle in radians by which each pair turns per position.

    With a rope_factor, wavelengths that fit more than `high` times into the original context are
    kept, those that fit fewer than `low` times multiplied by it; in between, ω is interpolated.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    ω = 1.0 / config.rope_theta ** (even / config.head_dim)             # fp32, as published
    if config.rope_factor == 1.0:
        return ω
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    wavelength = 2 * math.pi / ω                                        # in tokens
    waves = config.rope_original_max_position_embeddings / wavelength
    smooth = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * ω / config.rope_factor + smooth * ω


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + D/2) of each head of x (B, heads, T, D); cos, sin (B, 1, T, D/2)."""
    a, b = x.chunk(2, dim=-1)                # cos and sin are fp32, so the products are, as Meta's
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + ε) * weight, rounded before the weight, as Meta's is (torch's: after it)."""

    def forward(self, x):
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / √D + mask) v; H/K heads share each key/value head."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(C, self.heads * D, bias=False)
        self.k_proj = nn.Linear(C, self.kv_heads * D, bias=False)
        self.v_proj = nn.Linear(C, self.kv_heads * D, bias=False)
        self.o_proj = nn.Linear(self.heads * D, C, bias=False)

    def forward(self, x, rotation, mask, cache):
        # --- attend: the same in llama3.py, glm4.py (tests/test_same.py) ---
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, -1).transpose(1, 2)           # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)        # (B, K, T, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            keys, values, place = cache
            k, v = store(keys, place, k), store(values, place, v)               # (B, K, slots, D)
        if T == 1:           # heads that share k and v become H/K queries of one head, without GQA
            q = q.reshape(B, self.kv_heads, -1, q.shape[-1])  # 10 x faster: (B, K, H/K, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,  # T = 1 would see only key 0
            enable_gqa=q.shape[1] != k.shape[1]).reshape(B, self.heads, T, -1)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        # --- end of attend ---


class MLP(nn.Module):
    """SwiGLU, at each position by itself."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP: each reads the normed residual stream and adds to it."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotation, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class State(NamedTuple):
    """The KV cache of a batch, preallocated and updated in place."""
    position: Tensor                         # (B,) int64: number of tokens seen, row by row
    key: Tensor                              # (B, L, K, M, D), rotated, in the parameters' dtype
    value: Tensor                            # (B, L, K, M, D)

    capacity = property(lambda self: self.key.shape[3], doc="M, the number of tokens that fit.")


# --- cache: the same in gpt.py, llama3.py, glm4.py (tests/test_same.py) ---
def look_back(tokens: Tensor, state: State | None, context: int):
    """Where new tokens (B, T) stand and what they see: (positions, mask, caches).

    positions: (B or 1, T). mask: None where plain causal attention is right, else (B, 1, T, slots),
    True for what is seen. Two rows that have seen 3 and 1 tokens get T = 2 more (x: True):

        row 0   x x x x .        row 1   x x . . .
                x x x x x                x x x . .

    caches: of each layer (keys, values, place): what attention reads, and where to write in it.
    """
    B, T = tokens.shape
    steps = torch.arange(T, device=tokens.device)
    if state is None:
        if T > context:
            raise ValueError(f"{T} tokens do not fit into the context of {context}")
        return steps[None], None, itertools.repeat(None)
    if len(state.position) != B:
        raise ValueError(f"{B} rows of tokens, but a state of {len(state.position)}")
    positions = state.position[:, None] + steps                         # (B, T)
    rows, heads = (torch.arange(n, device=tokens.device) for n in (B, state.key.shape[2]))
    place = rows[:, None, None], heads[:, None], positions[:, None]     # broadcast: (B, heads, T)
    slots, causal = state.capacity, False    # torch.compile: fixed shapes, no check
    if not torch.compiler.is_compiling():
        low, high = torch.stack(state.position.aminmax()).tolist()      # waits for the GPU, once
        slots = high + T
        if slots > state.capacity:
            raise ValueError(f"{slots} tokens do not fit: the context of the model is {context}, "
                             f"the capacity of the state {state.capacity}")
        if low == high:                      # the same slots in all rows: faster by a slice
            place = ..., slice(high, slots), slice(None)
            causal = high == 0 or T == 1     # an empty cache; one token, which sees all
    seen = torch.arange(slots, device=tokens.device) <= positions[:, None, :, None]
    caches = [(state.key[:, i, :, :slots], state.value[:, i, :, :slots], place)
              for i in range(state.key.shape[1])]
    return positions, None if causal else seen, caches


def store(cache: Tensor, place: tuple, new: Tensor) -> Tensor:
    """Write `new` (B, heads, T, D) into `cache` (B, heads, slots, D); returns what attention reads.

    Earlier entries are constants: gradients flow only into `new`.
    """
    cache[place] = new.detach().to(cache.dtype)
    if not torch.is_grad_enabled():
        return cache.to(new.dtype)           # no copy, unless autocast gave `new` another dtype
    whole = cache.to(new.dtype, copy=True)   # kept by autograd, while the cache is overwritten
    whole[place] = new
    return whole
# --- end of cache ---


class Llama3(nn.Module):
    """Llama 3: (B, T) tokens -> (B, T, V) logits. Parameters are named as Hugging Face's."""
    OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-5)    # Llama 2's paper, §2.2; 3's states none

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.config = config
        C, V = config.hidden_size, config.vocab_size
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(C, config.rms_norm_eps)))
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.inverse_frequency = inverse_frequency(config)   # no buffer: .to(bfloat16) would round
        if not self.lm_head.weight.is_meta:  # on meta, drawing takes seconds
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's (§2.3 of its paper), as Meta published none: norms 1, the rest normal, residual
        projections scaled by 1/√(2 L)."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
            else:
                parameter.normal_(std=0.02)

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) after the final norm. With a state, the tokens continue the
        cached sequence, and it advances by T. ValueError if they do not fit."""
        positions, mask, caches = look_back(tokens, state, self.config.max_position_embeddings)
        ω = self.inverse_frequency = self.inverse_frequency.to(tokens.device)
        angles = positions[:, None, :, None] * ω    # (B or 1, 1, T, D/2); fp32: bf16 lacks 257
        rotation = angles.cos(), angles.sin()
        x = self.model.embed_tokens(tokens)                             # (B, T, C)
        for block, cache in zip(self.model.layers, caches):
            x = block(x, rotation, mask, cache)
        if state is not None:
            state.position.add_(tokens.shape[1])
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V): the head, for a loss that is computed piece by piece."""
        return self.lm_head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None, last: bool = False) -> Tensor:
        """(B, T) tokens -> (B, T, V): logits of every position, or (B, 1, V) of the last one."""
        hidden = self.hidden(tokens, state)
        return self.lm_head(hidden[:, -1:] if last else hidden)

    def new_state(self, batch_size: int, max_tokens: int) -> State:
        """An empty cache for `batch_size` rows of `max_tokens` tokens, at most the context."""
        c, like = self.config, self.model.embed_tokens.weight
        shape = (batch_size, c.num_hidden_layers, c.num_key_value_heads, min(max_tokens, c.context),
                 c.head_dim)
        return State(like.new_zeros(batch_size, dtype=torch.int64), like.new_zeros(shape),
                     like.new_zeros(shape))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Every parameter once, in groups for torch.optim.AdamW: only matrices decay. AdamW ignores
        two keys, which train.py reads: `lr_scale`, a factor of the learning rate, and
        `hidden_matrix`, true for the 2-D matrices inside the blocks (for optimisers like Muon)."""
        blocks, tables, norms = [], [], []
        for name, p in self.named_parameters():
            (norms if p.dim() < 2 else blocks if "layers." in name else tables).append(p)
        return [dict(params=blocks, weight_decay=weight_decay, lr_scale=1.0, hidden_matrix=True),
                dict(params=tables, weight_decay=weight_decay, lr_scale=1.0, hidden_matrix=False),
                dict(params=norms, weight_decay=0.0, lr_scale=1.0, hidden_matrix=False)]

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
                        dtype: torch.dtype | None = None, **overrides) -> "Llama3":
        """Read a checkpoint, folder or file, in any layout named on top; memory holds it once.

        dtype None keeps the stored one. overrides: config fields that the file states wrongly or,
        as Meta's max_position_embeddings and rope_factor, not at all.
        """
        path, shards = Path(path), meta_shards(Path(path))
        folder = path if path.is_dir() else path.parent
        file = shards[0].with_name("params.json") if shards else folder / "config.json"
        stated = json.loads(file.read_text(encoding="utf-8"))
        config = from_meta(shards, **stated) if shards else from_hugging_face(stated)
        config = replace(config, **overrides)
        tensors = join_shards(shards, config, device, dtype) if shards else to_ours(path)
        weights = {name: nn.Parameter(tensor.to(device, dtype)) for name, tensor in tensors}
        if config.tie_word_embeddings:       # a head that differs from the table wins: then untied
            head, table = weights.get("lm_head.weight"), weights["model.embed_tokens.weight"]
            if head is None or torch.equal(head.to(table.dtype), table):
                weights["lm_head.weight"] = table       # one Parameter under two names
            else:
                config = replace(config, tie_word_embeddings=False)
        with torch.device("meta"):                                      # shapes, no memory
            model = cls(config)
        model.load_state_dict(weights, strict=True, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json in the Hugging Face layout, each as a whole."""
        from safetensors.torch import save_file
        weights, stated = Path(directory, "model.safetensors"), Path(directory, "config.json")
        for older in ("ckpt.pt", "consolidated.00.pth", "model.safetensors.index.json"):
            if Path(directory, older).exists():
                raise ValueError(f"{directory} holds {older}, which may be read instead: move it")
        weights.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
                      torch_dtype=dtype, dtype=dtype, **asdict(self.config))
        scaling = {"rope_type": "llama3", **{name: config.pop(f"rope_{name}") for name in SCALING}}
        config["rope_scaling"] = scaling if self.config.rope_factor != 1 else None
        save_file(tensors, f"{weights}.part", {"format": "pt"})
        Path(f"{stated}.part").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(f"{stated}.part", f"{weights}.part")            # safetensors leaves 0600
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

# --- read_tensors: the same in gpt.py, llama3.py, glm4.py (tests/test_same.py) ---
def read_tensors(path: Path):
    """Yield (name, tensor) from a weights file, or from those of a folder; mapped, not copied.
    Without what trainers put around them: dicts, and prefixes of DDP, FSDP, torch.compile, peft."""
    if path.is_dir():
        kinds = ("model.safetensors.index.json", "model.safetensors",
                 "pytorch_model.bin.index.json", "pytorch_model.bin")
        path = next((path / kind for kind in kinds if (path / kind).exists()), path / kinds[1])
    outer = ("model", "state_dict", "model_state_dict", "module")
    # _orig_mod.transformer.h.0.ln_1.weight and h.0._fsdp_wrapped_module.ln_1.weight are h.0.ln_1...
    prefixes = r"^((base_model|model|transformer|module|_\w+)\.)+|(?<=\.)_\w+\."
    files, seen = {path: None}, set()        # file: the names to read from it (None: all)
    if path.suffix == ".json":               # the index decides which files belong together
        files, whole = {}, path.with_name(path.name.removesuffix(".index.json"))
        for name, place in json.loads(path.read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(path.with_name(place), []).append(name)    # no other folder's
        if whole.exists() and whole not in files:
            raise ValueError(f"{whole} and an index of other files: remove the older save")
    for file, names in files.items():
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            content = load_file(file)
        else:                                # a pickle; torch before 1.6 wrote it without a zip
            content = torch.load(file, map_location="cpu", weights_only=True,
                                 mmap=zipfile.is_zipfile(file))
        while around := next((key for key in outer if isinstance(content.get(key), dict)), None):
            content = content[around]
        for name in names or content:
            plain = re.sub(prefixes, "", name)
            if plain in seen:
                raise ValueError(f"{plain} is there twice, behind different prefixes: which is it?")
            seen.add(plain)
            yield plain, content[name]
# --- end of read_tensors ---


SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def from_hugging_face(stated: dict) -> Llama3Config:
    """Our config from a published config.json; rope_parameters is what transformers 5 writes."""
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    stated = {name: value for name, value in {**stated, **rope}.items() if value is not None}
    stated.setdefault("rope_type", stated.get("type", "default"))       # type: the older name
    for name, *known in (("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False),
                         ("mlp_bias", False), ("partial_rotary_factor", 1.0),
                         ("quantization_config", None), ("rope_type", "default", "llama3")):
        if stated.get(name, known[0]) not in known:
            raise ValueError(f"{name} is {stated[name]!r}: only {known} is supported")
    sizes = {"num_key_value_heads": stated["num_attention_heads"],      # transformers' defaults
             "head_dim": stated["hidden_size"] // stated["num_attention_heads"],
             "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    sizes |= {f.name: stated[f.name] for f in fields(Llama3Config) if f.name in stated}
    if stated["rope_type"] == "llama3":
        sizes |= {f"rope_{name}": stated[name] for name in SCALING}
    return Llama3Config(**sizes)


def to_ours(path: Path):
    """Yield (our name, tensor) of Hugging Face's, but RoPE's table and a classifier's head."""
    for name, tensor in read_tensors(path):
        if not name.endswith("rotary_emb.inv_freq") and name != "score.weight":
            yield name if name.startswith("lm_head.") else f"model.{name}", tensor


META = {    # Meta's name: ours, and the axis along which its shards divide it (None: each has all)
    "tok_embeddings": ("model.embed_tokens", 0), "output": ("lm_head", 0),
    "norm": ("model.norm", None), "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0), "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0), "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None), "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1), "feed_forward.w3": ("mlp.up_proj", 0),
}


def meta_shards(path: Path) -> list[Path]:
    """The files consolidated.NN.pth of Meta's layout, in order; [] where another layout is."""
    folder = path.parent if path.suffix == ".pth" else path
    if any(path.glob("model*.safetensors*")) or any(path.glob("pytorch_model*")):
        return []
    for place in (folder, folder / "original", folder / "original/mp8", folder / "original/mp16"):
        if (place / "params.json").exists() or (place / "consolidated.00.pth").exists():
            files = (place / f"consolidated.{n:02}.pth" for n in itertools.count(1))
            return [place / "consolidated.00.pth", *itertools.takewhile(Path.exists, files)]
    return []


def from_meta(shards, dim, n_layers, n_heads, n_kv_heads=None, vocab_size=-1, norm_eps=1e-5,
              rope_theta=None, use_scaled_rope=False, multiple_of=None, ffn_dim_multiplier=None):
    """Our config from params.json; V and intermediate_size from shapes, so that multiple_of and
    ffn_dim_multiplier, of which Meta computed the latter, are not needed."""
    rows = {name: len(t) * len(shards) for name, t in read_tensors(shards[0])}
    V, llama2 = rows["output.weight"], vocab_size == -1
    if vocab_size != V and not llama2:
        raise ValueError(f"{V} rows of a vocabulary of {vocab_size}: is one of the shards missing?")
    return Llama3Config(
        131072 if use_scaled_rope else 8192, dim, n_layers, n_heads,
        n_kv_heads or n_heads,               # 405B in 16 shards says 16: each of 8, stored twice
        dim // n_heads, rows["layers.0.feed_forward.w1.weight"], V, norm_eps,
        rope_theta or (10000.0 if llama2 else 500000.0),                # the official defaults
        (32.0 if dim in (2048, 3072) else 8.0) if use_scaled_rope else 1.0,         # 3.2 or 3.1
        tie_word_embeddings=True,            # Meta does not say: from_pretrained compares
        **(V3 if V == 128256 else {}))


def join_shards(shards: list[Path], config: Llama3Config, device: str, dtype: torch.dtype | None):
    """Yield (our name, our tensor) from all of Meta's shards, of which one at a time is mapped."""
    whole, count, D = {}, len(shards), config.head_dim
    names = {name for name, _ in read_tensors(shards[0])}
    for rank, shard in enumerate(shards):
        pieces = dict(read_tensors(shard))
        if pieces.keys() != names:           # else a part of some tensor would never be written
            raise ValueError(f"{shard} and {shards[0].name} differ in {names ^ pieces.keys()}")
        pieces.pop("rope.freqs", None)       # a table that Llama 1 and 2 stored
        for name, piece in pieces.items():
            layer, inner = re.fullmatch(r"(layers\.\d+\.|)(.*?)(?:\.weight)?", name).groups()
            ours, axis = META[inner]
            ours = f"model.{layer}{ours}.weight" if layer else f"{ours}.weight"
            if inner in ("attention.wq", "attention.wk"):               # its pairs are (2j, 2j + 1)
                piece = piece.unflatten(0, (-1, D // 2, 2)).transpose(1, 2).flatten(0, 2)
            if count == 1:
                yield ours, piece
                continue
            if inner == "tok_embeddings" and piece.shape[1] != config.hidden_size:
                axis = 1
            if rank == 0:
                shape = [n * count if i == axis else n for i, n in enumerate(piece.shape)]
                whole[ours] = torch.empty(shape, dtype=dtype or piece.dtype, device=device)
            part = whole[ours] if axis is None else whole[ours].chunk(count, axis)[rank]
            if part.shape != piece.shape:    # copy_ would broadcast
                raise ValueError(f"{name} of {shard} does not fit {shards[0].name}")
            part.copy_(piece)
    yield from whole.items()
