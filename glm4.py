"""GLM-4, GLM-4-0414 and ChatGLM3 in one file: build, train, load the published weights, generate.

One network in three generations (ChatGLM3: fewer layers, another vocabulary and ε). The whole
forward pass, in which each block reads the residual stream x (T, C) and adds to it twice:

    x = embed_tokens[token]
    L times:
        q, k, v = rotate(h W_q + b), rotate(h W_k + b), h W_v + b       h = norm(x)
        y = softmax(q kᵀ / √D + mask) v                 H heads; mask: -∞ for what comes later
        x = x + N(concat(y) W_o)                        N: norm in 0414, else the identity
        x = x + N((SiLU(h W_gate) * h W_up) W_down)     h = norm(x) again; SwiGLU, a gated MLP
    logits = norm(x) W_head

    norm(x) = x / √(mean(x²) + ε) * weight              RMSNorm (bf16: see below)
    SiLU(x) = x / (1 + exp(-x))
    rotate, at position t, turns the values a, b of channels 2j, 2j + 1 of a head, for 2j < R:
        (a cos φ - b sin φ, a sin φ + b cos φ)          φ = t ω_j,  ω_j = rope_theta^(-2j/R)

      channel of a head    0 1    2 3    4 5 6 7        D = 8, R = 4
      turned by            t ω_0  t ω_1  nothing

What differs from GPT-2 (gpt.py):

* positions are rotations of half of each head of q and k (RoPE), slower for longer contexts;
* RMSNorm subtracts no mean and has no bias (rounded after the weight, as in THUDM's code and torch,
  transformers rounds before); GLM-4-0414 also norms what each half of a block adds;
* all heads of q share 2 (or 4) heads of k and v, for a smaller cache (drawn in llama3.py);
* the MLP is gated, with gate and up in one matrix; the head is a matrix of its own;
* only q, k and v have a bias, in 32B-0414 nothing has.

    B batch   T time   C channels (hidden_size)   H heads   K key/value heads   D head size
    R rotated channels of a head   L layers   V vocabulary   M cache capacity in tokens

References: GLM team 2024, "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All
Tools"; THUDM/chatglm3-6b and glm-4-9b-chat modeling_chatglm.py (git blobs dc5c662, 7b3dfec);
transformers 5.23 models/glm and glm4; Su et al. 2021, "RoFormer". Loads ChatGLM3-6B and GLM-4-9B in
their original layout (.bin, int8, int4 too; their code is not run), Hugging Face's Glm and Glm4.

    model = GLM4.from_pretrained("path/to/glm-4-9b-chat")   # or GLM4(SIZES["glm-4-9b"]), untrained
    [new] = model.generate([[151331, 151333, 98]], 20, temperature=0.8, top_p=0.8, seed=1)
    model.save_pretrained("copy")                           # transformers opens it
    tokens = torch.tensor([[151331, 151333, 98, 99]])       # (B, T), after [gMASK] <sop>; to train:
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
class GLM4Config:
    """Sizes of a GLM, named as in Hugging Face's config.json; the defaults are transformers'."""
    max_position_embeddings: int = 131072
    hidden_size: int = 4096
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128                      # of its own: H D need not be C
    intermediate_size: int = 13696
    vocab_size: int = 151552
    rms_norm_eps: float = 1.5625e-07         # ChatGLM3 and 0414: 1e-5
    rope_theta: float = 10000.0              # 10000 * rope_ratio of the original configs
    partial_rotary_factor: float = 0.5       # the part of each head that RoPE rotates
    attention_bias: bool = True              # of q, k and v
    sandwich_norms: bool = False             # 0414: two more norms in each block
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
        R = int(self.head_dim * self.partial_rotary_factor)
        if R % 2 or not 2 <= R <= self.head_dim:
            raise ValueError(f"partial_rotary_factor {self.partial_rotary_factor} rotates {R} of "
                             f"{self.head_dim} channels: they go in pairs")

    context = property(lambda self: self.max_position_embeddings, doc="The longest sequence.")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "GLM4Config":
        """GLM-4 of this depth and width: heads of about 128 channels, two key/value heads."""
        heads = 2 * max(1, round(width / 256))
        size = 4 * max(1, round(width / heads / 4))                     # R = D/2 is even
        return cls(context, width, layers, heads, 2, size,
                   32 * max(1, round(width * 13696 / 4096 / 32)), vocab_size)


V3 = dict(vocab_size=65024, num_hidden_layers=28, rms_norm_eps=1e-5, eos_token_id=2, pad_token_id=0)
V4 = dict(eos_token_id=[151329, 151336, 151338], pad_token_id=151329)
V0414 = dict(rms_norm_eps=1e-5, sandwich_norms=True, **V4)
SIZES = {                                    # context, hidden_size, layers, H, K, D, ...
    "chatglm3-6b": GLM4Config(8192, **V3),                                      # 6,243,584,000
    "chatglm3-6b-32k": GLM4Config(32768, rope_theta=5e5, **V3),                 # 6,243,584,000
    "glm-4-9b": GLM4Config(8192, **V4),                                         # 9,399,951,360
    "glm-4-9b-chat": GLM4Config(131072, rope_theta=5e6, **V4),                  # 9,399,951,360
    "glm-4-9b-chat-1m": GLM4Config(1048576, 4096, 40, 32, 4, rope_theta=1e8, **V4),  # 9,483,857,920
    "glm-4-9b-0414": GLM4Config(32768, **V0414),                                # 9,400,279,040
    "glm-4-32b-0414": GLM4Config(32768, 6144, 61, 48, 2, 128, 23040, attention_bias=False,
                                 **V0414),                                      # 32,566,081,536
}


def inverse_frequency(config: GLM4Config, dtype: torch.dtype = torch.float32) -> Tensor:
    """ω: (R/2,) on the CPU, radians per position for each pair, in the official order of steps: at
    position 10^6, rounding in fp32 changes an angle by up to 0.03."""
    R = int(config.head_dim * config.partial_rotary_factor)
    return 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=dtype, device="cpu") / R)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbours among the first R channels of x (B, heads, T, D); cos, sin (B, 1, T, R/2)."""
    R = 2 * cos.shape[-1]
    a, b = x[..., 0:R:2], x[..., 1:R:2]                                 # (B, heads, T, R/2)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., R:]), dim=-1)


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / √D + mask) v; H/K heads share each key/value head."""

    def __init__(self, config: GLM4Config):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(C, self.heads * D, bias=bias)
        self.k_proj = nn.Linear(C, self.kv_heads * D, bias=bias)
        self.v_proj = nn.Linear(C, self.kv_heads * D, bias=bias)
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
    """SwiGLU, at each position by itself: one half of a wide product gates the other."""

    def __init__(self, config: GLM4Config):
        super().__init__()
        C, wide = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(C, 2 * wide, bias=False)          # gate first
        self.down_proj = nn.Linear(wide, C, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then MLP: each reads the normed residual stream and adds to it, in 0414 normed."""

    def __init__(self, config: GLM4Config):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(C, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(C, eps)  # as published; it norms the MLP's input
        self.mlp = MLP(config)
        N = nn.RMSNorm if config.sandwich_norms else nn.Identity
        self.post_self_attn_layernorm, self.post_mlp_layernorm = N(C, eps), N(C, eps)

    def forward(self, x, rotation, mask, cache):
        y = self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        x = x + self.post_self_attn_layernorm(y.to(x.dtype))            # under autocast bf16
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)).to(x.dtype))


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


class GLM4(nn.Module):
    """GLM: (B, T) tokens -> (B, T, V) logits. Parameters are named as Hugging Face's."""
    OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-8)

    def __init__(self, config: GLM4Config):
        super().__init__()
        self.config = config
        C, V = config.hidden_size, config.vocab_size
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=nn.RMSNorm(C, config.rms_norm_eps)))
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.inverse_frequency = inverse_frequency(config)   # no buffer: never cast, never on meta
        if not self.lm_head.weight.is_meta:  # on meta, drawing takes seconds
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As Megatron-LM, on which the authors' code is based, since they published none: norms 1,
        biases 0, the rest normal, residual projections scaled by 1/√(2 L)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
            else:
                parameter.normal_(std=0.02)

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) after the final norm. With a state, the tokens continue the
        cached sequence, and it advances by T. ValueError if they do not fit."""
        positions, mask, caches = look_back(tokens, state, self.config.max_position_embeddings)
        x = self.model.embed_tokens(tokens)                             # (B, T, C)
        ω, wide = self.inverse_frequency, torch.promote_types(x.dtype, torch.float32)
        if (ω.device, ω.dtype) != (x.device, wide):
            self.inverse_frequency = ω = inverse_frequency(self.config, wide).to(x.device)
        angles = positions[:, None, :, None] * ω                        # (B or 1, 1, T, R/2)
        rotation = angles.cos(), angles.sin()
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
        blocks, tables, vectors = [], [], []
        for name, p in self.named_parameters():
            (vectors if p.dim() < 2 else blocks if "layers." in name else tables).append(p)
        return [dict(params=blocks, weight_decay=weight_decay, lr_scale=1.0, hidden_matrix=True),
                dict(params=tables, weight_decay=weight_decay, lr_scale=1.0, hidden_matrix=False),
                dict(params=vectors, weight_decay=0.0, lr_scale=1.0, hidden_matrix=False)]

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
                        dtype: torch.dtype | None = None, **overrides) -> "GLM4":
        """Read a checkpoint, folder or file, in any layout named on top; memory holds it once.

        dtype None keeps the stored one; float16 overflows in 0414, bfloat16 does not.
        overrides: config fields that the file states wrongly, as glm-4-9b-chat-hf and -chat-1m-hf
        do: rope_theta is 10000, but they were trained with 5e6 and 1e8 (the original layout's).
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path.with_name("config.json")
        stated = json.loads(file.read_text(encoding="utf-8"))
        config = replace(to_config(stated), **overrides)
        tensors = dequantised(read_tensors(path), stated.get("quantization_bit"))
        weights = {name: nn.Parameter(tensor.to(device, dtype))
                   for name, tensor in to_ours(tensors, config)}
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
        """Write model.safetensors and config.json, each as a whole, in the layout of Hugging Face's
        Glm4 with `sandwich_norms`, else of Glm, in which ChatGLM3 runs unchanged."""
        from safetensors.torch import save_file
        weights, stated = Path(directory, "model.safetensors"), Path(directory, "config.json")
        for older in ("ckpt.pt", "consolidated.00.pth", "model.safetensors.index.json"):
            if Path(directory, older).exists():
                raise ValueError(f"{directory} holds {older}, which may be read instead: move it")
        weights.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        kind = "Glm4" if self.config.sandwich_norms else "Glm"
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        config = dict(architectures=[f"{kind}ForCausalLM"], model_type=kind.lower(),
                      torch_dtype=dtype, dtype=dtype, hidden_act="silu", **asdict(self.config))
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


FIELDS = {                                   # config.json of the original layout: our field
    "padded_vocab_size": "vocab_size", "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim", "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps", "add_qkv_bias": "attention_bias",
}
RENAMED = {                                  # part of its tensor names: of ours; in this order
    "embedding.word_embeddings": "embed_tokens", "encoder.": "", "output_layer": "lm_head",
    "final_layernorm": "norm",
    "self_attention.dense": "self_attn.o_proj", "self_attention": "self_attn",
    "dense_h_to_4h": "gate_up_proj", "dense_4h_to_h": "down_proj",
}


def to_config(stated: dict) -> GLM4Config:
    """Our config from the config.json of any layout."""
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    stated = {name: value for name, value in {**stated, **rope}.items() if value is not None}
    if rope.get("rope_type", rope.get("type")) not in (None, "default"):
        raise ValueError(f"RoPE is scaled by {rope}, which is not supported: take rope_scaling out "
                         "of config.json and stay within max_position_embeddings")
    for name, *known in (("model_type", "chatglm", "glm", "glm4"), ("hidden_act", "silu"),
                         ("rmsnorm", True), ("post_layer_norm", True), ("add_bias_linear", False),
                         ("apply_residual_connection_post_layernorm", False), ("pre_seq_len", None),
                         ("multi_query_attention", True), ("vision_config", None),
                         ("quantization_config", None)):
        if stated.get(name, known[0]) not in known:
            raise ValueError(f"{name} is {stated[name]!r}: only {known} is supported")
    if stated["model_type"] == "chatglm":
        stated = {"rope_ratio": 1, "add_qkv_bias": False, **stated}
        stated |= {ours: stated[theirs] for theirs, ours in FIELDS.items()}
        stated["rope_theta"] = 10000.0 * stated["rope_ratio"]    # the base, not positions
    stated["sandwich_norms"] = stated["model_type"] == "glm4"
    return GLM4Config(**{f.name: stated[f.name] for f in fields(GLM4Config) if f.name in stated})


def to_ours(tensors, config: GLM4Config):
    """Yield (our name, our tensor) for each published one."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, tensor in tensors:
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        name = name if name.startswith("lm_head.") else f"model.{name}"
        if "query_key_value" in name:                                   # the rows of q, of k, of v
            for letter, part in zip("qkv", tensor.tensor_split((H * D, (H + K) * D))):
                yield name.replace("query_key_value", f"{letter}_proj"), part
        elif name not in ("model.rotary_pos_emb.inv_freq", "model.score.weight"):   # never used
            yield name, tensor


def dequantised(tensors, bits: int | None):
    """Yield the tensors, ChatGLM3's int8 and int4 (two columns a byte, the even one high)
    dequantised: each row of integers times its scale (quantization.py beside its model)."""
    halves = {}                              # integers and scales whose other half is yet to come
    for name, tensor in tensors:
        base = name.removesuffix("_scale")
        if tensor.dtype != torch.int8 and name == base:
            yield name, tensor
        elif base not in halves:
            halves[base] = tensor
        else:
            scale, q = sorted((tensor, halves.pop(base)), key=Tensor.dim)   # (rows,), a matrix
            if scale.shape != q.shape[:1]:   # one of shape (1,) would broadcast
                raise ValueError(f"{base} is {[*q.shape]}, its scales are {[*scale.shape]}")
            if bits == 4:
                q = torch.stack((q >> 4, q << 4 >> 4), dim=-1).flatten(-2)  # shifts keep the sign
            yield base, q * scale[:, None]
