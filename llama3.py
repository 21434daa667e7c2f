"""Llama 3 in one file, with 3.1 and 3.2: build it, train it, load the published weights, generate.

A stack of blocks that read one residual stream and add to it:

    x = embed_tokens[token]
    each block:  x += attention(rms_norm(x));  x += down(silu(gate(h)) * up(h)),  h = rms_norm(x)
    logits = rms_norm(x) @ lm_head.T

What differs from GPT-2 (gpt.py):

* positions are rotations of queries and keys (RoPE), so attention sees distances; 3.1 slows the
  low frequencies, which stretches a training at 8192 ids to a context of 131072;
* RMSNorm: no mean is subtracted and there is no bias, as there is none anywhere in the model;
* several heads share one key/value head (grouped queries): a smaller memory of the past;
* the MLP is gated (SwiGLU): the product of two matrices' outputs, one through silu, enters a third;
* the head is a matrix of its own, but for the small 3.2 models, where it is the token table.

    B batch   T time   C channels (hidden_size)   H heads   K key/value heads   D head size
    L layers  V vocabulary   M the most ids that a state can hold

References: Grattafiori et al. 2024, "The Llama 3 Herd of Models"; Su et al. 2021 (RoPE); Ainslie
et al. 2023 (grouped queries); Shazeer 2020 (SwiGLU); Zhang and Sennrich 2019 (RMSNorm);
meta-llama/llama3@a0940f9 llama/model.py; meta-llama/llama-models@a9c89c4 models/llama3/model.py.

Loads Meta's layout (params.json and consolidated.NN.pth, any number of shards) and Hugging Face's
(one file or shards with an index). Writes the Hugging Face layout.

    model = Llama3.from_pretrained("path/to/Llama-3.2-1B")  # or Llama3(SIZES["llama3.2-1b"])
    logits = model(torch.tensor([[128000, 9906]]))          # (B, T) ids -> (B, T, V)
    [new] = model.generate([[128000, 9906]], 20, temperature=0.6, top_p=0.9, seed=1)
    model.save_pretrained("copy")                           # transformers opens it
"""
import argparse
import itertools
import json
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Llama3Config:
    """Sizes of a Llama 3, by the names of the published config.json; the default is 8B."""
    vocab_size: int = 128256
    max_position_embeddings: int = 8192
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 14336
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 1.0                 # the published rope_scaling, since 3.1; 1: no scaling
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 8192        # original_max_position_embeddings
    tie_word_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a positive integer, not {value!r}")
            if field.type is float and not (type(value) in (int, float) and 0 < value < math.inf):
                raise ValueError(f"{field.name} must be a positive number, not {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} must be true or false, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, to be turned in pairs, not {self.head_dim}")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise ValueError(f"rope_high_freq_factor {self.rope_high_freq_factor} must be above "
                             f"rope_low_freq_factor {self.rope_low_freq_factor}")

    @property
    def context(self) -> int:
        """The most ids that the model can see."""
        return self.max_position_embeddings

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "Llama3Config":
        """Llama 3 of this depth and width, in the proportions of 8B; small ones tied, as in 3.2.

        Heads of 128 channels from 3B on, of about 64 below; four to each key/value head, or fewer
        where that does not come out even; an MLP 3.5 times as wide, in steps of 32.
        """
        heads = max(1, width // (128 if width >= 3072 else 64))
        shared = min(n for n in range(1, heads + 1) if heads % n == 0 and n >= heads / 4)
        size = max(2, width // heads // 2 * 2)                          # even: turned in pairs
        return cls(vocab_size, context, width, layers, heads, shared, size,
                   -(-7 * width // 64) * 32, tie_word_embeddings=width < 4096)


LLAMA_8B = Llama3Config(bos_id=128000, eos_ids=(128001,))
LLAMA_70B = replace(LLAMA_8B, hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                    intermediate_size=28672)
LONG = dict(max_position_embeddings=131072, rope_factor=8.0)
SMALL = dict(max_position_embeddings=131072, rope_factor=32.0, tie_word_embeddings=True,
             intermediate_size=8192)
SIZES = {
    "llama3-8b": LLAMA_8B,                                                      # 8,030,261,248
    "llama3-70b": LLAMA_70B,                                                    # 70,553,706,496
    "llama3.1-8b": replace(LLAMA_8B, **LONG),                                   # 8,030,261,248
    "llama3.1-70b": replace(LLAMA_70B, **LONG),                                 # 70,553,706,496
    "llama3.1-405b": replace(LLAMA_8B, hidden_size=16384, num_hidden_layers=126,
                             num_attention_heads=128, intermediate_size=53248,
                             **LONG),                                           # 405,853,388,800
    "llama3.2-1b": replace(LLAMA_8B, hidden_size=2048, num_hidden_layers=16, head_dim=64,
                           **SMALL),                                            # 1,235,814,400
    "llama3.2-3b": replace(LLAMA_8B, hidden_size=3072, num_hidden_layers=28,
                           num_attention_heads=24, **SMALL),                    # 3,212,749,824
}


@dataclass
class State:
    """What a batch remembers: the keys and values of every layer, in the parameters' dtype."""
    position: Tensor                         # (B,) int64: how many ids each row has seen
    key: Tensor                              # (B, L, M, K, D), rotated
    value: Tensor                            # (B, L, M, K, D)

    @property
    def max_tokens(self) -> int | None:
        """M, the most ids it can hold; None where there is no limit."""
        return self.key.shape[2]

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


def remember(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """Write `new` (B, T, K, D) into `cache` (B, M, K, D) at `positions` (B, T); the whole cache.

    What was there is data: under autograd, gradients reach `new` and nothing before it.
    """
    rows = torch.arange(len(cache), device=cache.device)[:, None]       # (B, 1)
    cache[rows, positions] = new.detach().to(cache.dtype)
    whole = cache.to(new.dtype)                                         # differs under autocast
    return whole.index_put((rows, positions), new) if torch.is_grad_enabled() else whole


def frequencies(config: Llama3Config, device=None) -> Tensor:
    """(D/2,) fp32: the angle in radians by which each pair of channels turns per position.

    With rope_factor f (llama-models model.py, apply_scaling): waves that fit into the original
    context more than `high` times stay, those that fit less than `low` times become f times
    longer, and between the two it is a blend.
    """
    even = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    turn = 1.0 / config.rope_theta ** (even / config.head_dim)   # in fp32 as published: an ulp more
    if config.rope_factor == 1.0:                                # or less shows at position 1500
        return turn
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    fits = config.rope_original_context / (2 * math.pi / turn)
    stay = ((fits - low) / (high - low)).clamp(0, 1)
    return (1 - stay) * turn / config.rope_factor + stay * turn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, D/2 + j) of each head of x (B, T, H, D); cos and sin (B, T, 1, D/2)."""
    a, b = x.float().chunk(2, dim=-1)        # in fp32, as Meta: bf16 holds no angle of position 257
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight. In bf16, rounded before the weight, as Meta's is; torch's is not."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()                                                # a mean of squares
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal self-attention; H/K query heads share each key/value head."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(C, self.heads * D, bias=False)
        self.k_proj = nn.Linear(C, self.kv_heads * D, bias=False)
        self.v_proj = nn.Linear(C, self.kv_heads * D, bias=False)
        self.o_proj = nn.Linear(self.heads * D, C, bias=False)

    def forward(self, x, rotation, positions, mask, cache):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, -1), *rotation)        # (B, T, H, D)
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), *rotation)     # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1)
        if cache is not None:
            k = remember(cache[0], positions, k)                        # (B, M, K, D)
            v = remember(cache[1], positions, v)
        # --- attend: the same in glm4.py (tests/test_same.py) ---
        k, v = k.transpose(1, 2), v.transpose(1, 2)                     # (B, K, T or M, D)
        if T == 1:                           # heads that share a key are rows of one query: with
            q = q.view(B, self.kv_heads, -1, q.shape[-1])   # enable_gqa, bf16 is 10x slower on CPUs
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)         # (B, K, H/K, D)
        else:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None,
                enable_gqa=self.heads != self.kv_heads).transpose(1, 2)         # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))
        # --- end of attend ---


class MLP(nn.Module):
    """Gated MLP, at each position by itself."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)   # w1
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)     # w3
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)   # w2

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP: each reads the normed stream and adds to it."""

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotation, positions, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), rotation, positions, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama3(nn.Module):
    """Llama 3: (B, T) ids -> (B, T, V) logits. Parameters are named as Hugging Face's."""
    OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-5)    # Llama 2's paper, §2.2; 3's states none
    L2WRAP = 0.0                                     # RWKV's penalty on large logits: none here

    def __init__(self, config: Llama3Config):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding.from_pretrained(table, freeze=False),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not table.is_meta:                # there, normal_ would import torch's compiler: 1.5 s
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Norms 1, the rest normal; what adds to the stream, less with depth.

        Meta published no initialisation. This is GPT-2's (§2.3 of its paper), whose 0.02 is also
        the initializer_range in the published config.json.
        """
        for name, parameter in self.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):  # 2 per layer add up
                parameter.normal_(std=0.02 / (2 * self.config.num_hidden_layers) ** 0.5)
            else:
                parameter.normal_(std=0.02)

    def new_state(self, batch_size: int, max_tokens: int) -> State:
        """An empty memory for `batch_size` rows of at most `max_tokens` ids each."""
        config, like = self.config, self.model.embed_tokens.weight
        shape = (batch_size, config.num_hidden_layers, max_tokens, config.num_key_value_heads,
                 config.head_dim)
        return State(like.new_zeros(batch_size, dtype=torch.int64), like.new_zeros(shape).detach(),
                     like.new_zeros(shape).detach())

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C) after the final norm.

        With a state, the ids go on from what it has seen, and it advances by T. ValueError if they
        do not fit into the context or the state.
        """
        if not torch.compiler.is_compiling():                           # it reads a number back
            self.check_room(tokens, state)
        steps = torch.arange(tokens.shape[1], device=tokens.device)     # (T,)
        if state is None:
            positions, mask = steps[None], None                         # (1, T)
        else:
            positions = state.position[:, None] + steps                 # (B, T)
            slots = torch.arange(state.max_tokens, device=tokens.device)
            mask = (slots <= positions[:, :, None])[:, None]            # (B, 1, T, M)
        angles = positions[:, :, None, None] * frequencies(self.config, tokens.device)
        rotation = angles.cos(), angles.sin()                           # (B, T, 1, D/2) each, fp32
        x = self.model.embed_tokens(tokens)                             # (B, T, C)
        for i, block in enumerate(self.model.layers):
            cache = None if state is None else (state.key[:, i], state.value[:, i])
            x = block(x, rotation, positions, mask, cache)
        if state is not None:
            state.position += tokens.shape[1]
        return self.model.norm(x)

    def check_room(self, tokens: Tensor, state: State | None) -> None:
        """ValueError unless these ids fit into the context and into the state."""
        end = tokens.shape[1] if state is None else tokens.shape[1] + int(state.position.max())
        room = self.config.context if state is None else min(self.config.context, state.max_tokens)
        if end > room:
            raise ValueError(f"{end} tokens do not fit: the context of the model is "
                             f"{self.config.context}" + (f", the state holds {room}" * bool(state)))
        if state is not None and len(tokens) != len(state.position):
            raise ValueError(f"{len(tokens)} rows of tokens, but a state of {len(state.position)}")

    def logits(self, hidden: Tensor, state: State | None = None) -> Tensor:
        """(B, T, C) -> (B, T, V): the head."""
        tied = self.config.tie_word_embeddings
        return F.linear(hidden, self.model.embed_tokens.weight) if tied else self.lm_head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V): logits of every position."""
        return self.logits(self.hidden(tokens, state), state)

    def parameter_groups(self) -> list[dict]:
        """Parameters for the optimiser: matrices decay, norms do not."""
        return [{"params": [p for p in self.parameters() if (p.dim() > 1) == decay],
                 "lr_scale": 1.0, "decay": decay} for decay in (True, False)]

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu",
                        dtype: torch.dtype | None = None, **overrides) -> "Llama3":
        """Read a checkpoint, folder or file, in any layout named on top; memory holds it once.

        dtype None keeps the stored one. overrides: config fields that the file tells wrongly, or,
        as Meta's the context and rope_factor, not at all.
        ValueError or OSError of one line if it is no such checkpoint.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        folder, shards = path if path.is_dir() else path.parent, meta_shards(path)
        config = read_params(shards) if shards else read_config(folder / "config.json")
        unknown = set(overrides) - {field.name for field in fields(config)}
        if unknown:
            raise ValueError(f"Llama3Config has no field {', '.join(sorted(unknown))}")
        config = replace(config, **overrides)
        if shards:
            tensors = join_shards(shards, config, device, dtype)
        else:
            tensors = {name: tensor.to(device, dtype) for name, tensor in read_tensors(path)
                       if not name.endswith("rotary_emb.inv_freq")}     # saved by old versions
        with torch.device("meta"):                                      # shapes, no memory
            model = cls(settle_head(tensors, config))
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not fit its config: {reason}") from None
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json in the Hugging Face layout, each as a whole."""
        from safetensors.torch import save_file
        weights, stated = Path(directory, "model.safetensors"), Path(directory, "config.json")
        weights.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, f"{weights}.part", {"format": "pt"})
        config = json.dumps(published_config(self.config, self.model.norm.weight.dtype), indent=2)
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


META = {                       # Meta's name: ours, and the axis along which its shards divide it
    "tok_embeddings": ("model.embed_tokens", 0),                        # by width before Llama 3
    "attention_norm": ("input_layernorm", None),                        # None: each holds all
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}


def meta_shards(path: Path) -> list[Path]:
    """The files of Meta's layout at this path, in order; [] if it holds another layout."""
    folder = path if path.is_dir() else path.parent
    other = any(any(folder.glob(kind)) for kind in ("model*.safetensors", "pytorch_model*.bin"))
    if path.suffix != ".pth" and (path.is_file() or other):
        return []
    for place in (folder, *(folder / f"original{size}" for size in ("", "/mp8", "/mp16"))):
        shards = sorted(place.glob("consolidated.*.pth"))
        names = [f"consolidated.{n:02}.pth" for n in range(len(shards) or 1)]
        if (shards or (place / "params.json").exists()) and [file.name for file in shards] != names:
            raise FileNotFoundError(f"{place} lacks shards of consolidated.NN.pth: "
                                    f"it has {', '.join(file.name for file in shards) or 'none'}")
        if shards:
            return shards
    return []


def read_params(shards: list[Path]) -> Llama3Config:
    """Config of Meta's layout: params.json, and the shapes for what it leaves out."""
    path = shards[0].parent / "params.json"
    stated, first = read_json(path), dict(read_tensors(shards[0]))      # mapped, not read
    unknown = set(stated) - {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps",
                             "multiple_of", "ffn_dim_multiplier", "rope_theta", "use_scaled_rope"}
    if unknown:
        raise ValueError(f"{path} has {', '.join(sorted(unknown))}: that is no plain Llama 3")
    try:
        wq, wk, w1, output = (first[f"{name}.weight"].shape[0] * len(shards) for name in (
            "layers.0.attention.wq", "layers.0.attention.wk", "layers.0.feed_forward.w1", "output"))
        C, H = stated["dim"], stated["n_heads"]
        K, D, layers = stated.get("n_kv_heads") or H, C // H, stated["n_layers"]
        spoilt = (wq, wk) != (H * D, K * D)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} and {shards[0].name} do not tell the sizes: {error!r}") from None
    if spoilt:
        raise ValueError(f"{path} asks for {H} and {K} heads of {D}, but wq and wk have {wq} and "
                         f"{wk} rows in all {len(shards)} shards: is one missing?")
    llama2 = stated.get("vocab_size", -1) == -1
    vocab_size = output if llama2 else stated["vocab_size"]
    scaled = bool(stated.get("use_scaled_rope"))
    return Llama3Config(
        vocab_size, 131072 if scaled else 8192, C, layers, H,
        K,                                   # 405B in 16 shards says 16: each of its 8 twice
        D, w1, stated.get("norm_eps", 1e-5),
        stated.get("rope_theta", 10000.0 if llama2 else 500000.0),      # the official defaults
        (32.0 if C in (2048, 3072) else 8.0) if scaled else 1.0,        # 3.2 or 3.1
        tie_word_embeddings=True,            # Meta does not say: settle_head compares
        bos_id=128000 if vocab_size == 128256 else None,
        eos_ids=(128001,) if vocab_size == 128256 else ())


def from_meta(name: str, tensor: Tensor, config: Llama3Config) -> tuple[str, Tensor, int | None]:
    """(our name, our tensor, the axis that shards divide) of one of Meta's tensors."""
    layer, inner = re.fullmatch(r"(layers\.\d+\.)?(.*)", name).groups()
    inner = inner.removesuffix(".weight")
    if f"{layer or ''}{inner}.weight" != name or inner not in META:
        return name, tensor, None                                       # unknown: refused as such
    ours, axis = META[inner]
    turned = inner in ("attention.wq", "attention.wk")
    if tensor.dim() != (1 if axis is None else 2) or turned and len(tensor) % config.head_dim:
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not fit the params")
    if inner == "tok_embeddings" and tensor.shape[1] != config.hidden_size:
        axis = 1
    if turned:                               # Meta turns neighbours (2j, 2j+1), we (j, D/2 + j)
        pairs = tensor.unflatten(0, (-1, config.head_dim // 2, 2))      # (H or K, D/2, 2, C)
        tensor = pairs.transpose(1, 2).flatten(0, 2)
    return f"{'model.' if layer else ''}{layer or ''}{ours}.weight", tensor, axis


def join_shards(shards: list[Path], config: Llama3Config, device: str,
                dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Our tensors from all of Meta's shards, with one open at a time; a single one stays mapped."""
    tensors, count = {}, len(shards)
    for rank, shard in enumerate(shards):
        left = set(tensors)
        for name, piece in read_tensors(shard):
            if name == "rope.freqs":         # a table that Llama 1 and 2 stored
                continue
            ours, piece, axis = from_meta(name, piece, config)
            if count == 1:
                tensors[ours] = piece.to(device, dtype)
                continue
            if rank == 0:
                size = [n * count if i == axis else n for i, n in enumerate(piece.shape)]
                tensors[ours] = torch.empty(size, dtype=dtype or piece.dtype, device=device)
            elif ours not in tensors:
                raise ValueError(f"{shard} has {name}, unlike {shards[0].name}")
            whole = tensors[ours]
            part = whole if axis is None else whole.tensor_split(count, axis)[rank]
            if part.shape != piece.shape:
                raise ValueError(f"{name} of {shard} does not fit {shards[0].name}")
            part.copy_(piece)
            left.discard(ours)
        if left:
            raise ValueError(f"{shard} lacks {', '.join(sorted(left)[:3])}, unlike the others")
    return tensors


def settle_head(tensors: dict[str, Tensor], config: Llama3Config) -> Llama3Config:
    """Said to be tied: drop a head that equals the token table; one that differs wins."""
    head, table = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or table is None:
        return config
    if head.dtype == table.dtype and torch.equal(head, table):
        del tensors["lm_head.weight"]
        return config
    return replace(config, tie_word_embeddings=False)


ROPE = {"factor": "rope_factor", "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_context"}    # published: our field


def read_rope(stated: dict, path: Path) -> dict:
    """Our fields for rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path} says rope_scaling = {rope!r}, which is no object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path} asks for RoPE of type {kind!r}: only 'llama3' is supported")
    theta = rope.get("rope_theta", stated.get("rope_theta", 10000.0))   # transformers' default
    if kind == "default":
        return {"rope_theta": theta}
    if set(ROPE) - set(rope):
        raise ValueError(f"{path} scales RoPE without {', '.join(sorted(set(ROPE) - set(rope)))}")
    return {"rope_theta": theta, **{field: rope[name] for name, field in ROPE.items()}}


def read_config(path: Path) -> Llama3Config:
    """config.json of a Hugging Face Llama; ValueError if it asks for other mathematics."""
    stated = {name: value for name, value in read_json(path).items() if value is not None}
    for name, plain in (("model_type", "llama"), ("hidden_act", "silu"), ("attention_bias", False),
                        ("mlp_bias", False), ("partial_rotary_factor", 1.0),
                        ("quantization_config", None)):
        if stated.get(name, plain) != plain:
            raise ValueError(f"{path} says {name} = {stated[name]!r}: only {plain!r} is supported")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads"):
        if type(stated.get(name)) is not int or stated[name] < 1:
            raise ValueError(f"{path} says {name} = {stated.get(name)!r}, not a positive integer")
    heads = stated["num_attention_heads"]
    sizes = {"num_key_value_heads": heads, "head_dim": stated["hidden_size"] // heads,
             "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}     # transformers' defaults
    sizes |= {field.name: stated[field.name] for field in fields(Llama3Config)
              if field.name in stated and not field.name.startswith("rope_")}
    eos = stated.get("eos_token_id", [])
    return Llama3Config(**sizes, **read_rope(stated, path), bos_id=stated.get("bos_token_id"),
                        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
                        pad_id=stated.get("pad_token_id"))


def published_config(config: Llama3Config, dtype: torch.dtype) -> dict:
    """What config.json says of a model whose weights have this dtype."""
    sizes = {name: value for name, value in asdict(config).items()
             if name not in ("bos_id", "eos_ids", "pad_id", *ROPE.values())}
    scaling = {name: getattr(config, field) for name, field in ROPE.items()}
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, **sizes,
            "rope_scaling": None if config.rope_factor == 1 else {**scaling, "rope_type": "llama3"},
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
        model = Llama3.from_pretrained(args.weights, device, getattr(torch, args.dtype or "", None))
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
