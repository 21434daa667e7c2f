"""GLM-4, GLM-4-0414 and ChatGLM3 in one file: build, train, load the published weights, generate.

One network in three generations. No code from a checkpoint is run, and transformers is not needed:

    x = embed_tokens[token]
    each block:  x += norm(attention(norm(x)));  x += norm(mlp(norm(x)))    outer norms: 0414 only
    logits = norm(x) @ lm_head.T

What differs from GPT-2 (gpt.py):

* RoPE: positions turn the queries and keys. Only the first half of each head is turned, in pairs of
  neighbouring channels; longer contexts have a larger `rope_theta` (the authors' rope_ratio times
  10000);
* RMSNorm: no mean, no bias; GLM-4-0414 norms what each half of a block adds as well;
* grouped queries: two (or four) key/value heads serve all the query heads;
* the MLP is SwiGLU, silu(gate) * up, with gate and up in one matrix;
* only q, k and v have a bias (32B-0414: nothing has); the head is a matrix of its own.

    B batch   T time   C channels (hidden_size)   H heads   K key/value heads   D head size
    R turned channels of a head   L layers   V vocabulary   M the most ids that a state can hold

References: GLM team 2024, "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All
Tools"; THUDM/chatglm3-6b and glm-4-9b-chat modeling_chatglm.py (git blobs dc5c662, 7b3dfec);
transformers 5.23 models/glm and models/glm4; Su et al. 2021, "RoFormer".

Loads ChatGLM3-6B and GLM-4-9B in their original layout (also .bin shards, and ChatGLM3's own int8
and int4), Hugging Face Glm and Glm4 (0414). Writes the Hugging Face layouts.

    model = GLM4.from_pretrained("path/to/glm-4-9b-chat")   # or GLM4(SIZES["glm-4-9b"]), untrained
    logits = model(torch.tensor([[151331, 151333, 98]]))    # (B, T) ids -> (B, T, V)
    [new] = model.generate([[151331, 151333, 98]], 20, temperature=0.8, stop=model.config.eos_ids)
    model.save_pretrained("copy")                           # transformers opens it
"""
import argparse
import itertools
import json
import os
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GLM4Config:
    """Sizes of a GLM, by the names of Hugging Face's config.json and with its defaults."""
    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128                      # of its own: H * D need not be C
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1.5625e-07         # ChatGLM3 and 0414: 1e-5
    rope_theta: float = 10000.0              # 10000 * rope_ratio of the original configs
    partial_rotary_factor: float = 0.5       # the part of each head that RoPE turns
    attention_bias: bool = True              # of q, k and v
    sandwich_norms: bool = False             # 0414: two more norms in each block
    tie_word_embeddings: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
            if field.type is float and (type(value) not in (int, float) or not 0 < value < 1e12):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{name} must be true or false, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.rotary_size % 2 or not 2 <= self.rotary_size <= self.head_dim:
            raise ValueError(f"partial_rotary_factor {self.partial_rotary_factor} turns "
                             f"{self.rotary_size} of {self.head_dim} channels: they go in pairs")

    @property
    def context(self) -> int:
        """The most ids that the model was made to see."""
        return self.max_position_embeddings

    @property
    def rotary_size(self) -> int:
        """R, how many channels of a head are turned."""
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "GLM4Config":
        """GLM-4 of this depth and width: heads of about 128 channels in two groups."""
        heads = 2 * max(1, round(width / 256))
        return cls(vocab_size, width, 32 * max(1, round(width * 107 / 1024)),     # 13696 / 4096
                   layers, heads, head_dim=4 * max(1, round(width / heads / 4)),  # R is even
                   max_position_embeddings=context)


CHATGLM3 = GLM4Config(65024, num_hidden_layers=28, max_position_embeddings=8192, rms_norm_eps=1e-5,
                      eos_ids=(2,), pad_id=0)
GLM_4 = GLM4Config(max_position_embeddings=8192, eos_ids=(151329, 151336, 151338), pad_id=151329)
GLM_0414 = replace(GLM_4, max_position_embeddings=32768, rms_norm_eps=1e-5, sandwich_norms=True)
SIZES = {
    "chatglm3-6b": CHATGLM3,                                                    # 6,243,584,000
    "chatglm3-6b-32k": replace(CHATGLM3, max_position_embeddings=32768, rope_theta=5e5),  # the same
    "glm-4-9b": GLM_4,                                                          # 9,399,951,360
    "glm-4-9b-chat": replace(GLM_4, max_position_embeddings=131072, rope_theta=5e6),      # the same
    "glm-4-9b-chat-1m": replace(GLM_4, max_position_embeddings=1048576, rope_theta=1e8,
                                num_key_value_heads=4),                         # 9,483,857,920
    "glm-4-9b-0414": GLM_0414,                                                  # 9,400,279,040
    "glm-4-32b-0414": replace(GLM_0414, hidden_size=6144, intermediate_size=23040,
                              num_hidden_layers=61, num_attention_heads=48,
                              attention_bias=False),                            # 32,566,081,536
}


@dataclass
class State:
    """What a batch remembers: the keys and values of every layer, in the parameters' dtype."""
    position: Tensor                         # (B,) int64: how many ids each row has seen
    key: Tensor                              # (B, L, M, K, D), turned by their positions
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


def rotations(positions: Tensor, config: GLM4Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(B, T) positions -> cosine and sine of each pair's angle, two of (B, T, 1, R/2).

    RoFormer §3.2; the exponents run over R, the turned channels, not over D. In the order of the
    official code: at position 10^6 an fp32 angle is up to 0.03 off, in training as well.
    """
    pairs = torch.arange(0, config.rotary_size, 2, dtype=dtype, device=positions.device)   # (R/2,)
    speed = 1.0 / config.rope_theta ** (pairs / config.rotary_size)     # radians per token
    angles = positions[:, :, None, None].to(dtype) * speed              # (B, T, 1, R/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R channels of (B, T, H, D), neighbours being a pair; the rest stays."""
    R = 2 * cos.shape[-1]
    a, b = x[..., 0:R:2], x[..., 1:R:2]                                 # (B, T, H, R/2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., R:]), dim=-1)          # computed in fp32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the channels (Zhang and Sennrich 2019)."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x):
        # The original order: the weight too is applied in fp32. Hugging Face rounds before it,
        # which gives other digits in half precision, neither of them closer to fp32.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), self.eps)
        return y.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; query heads 0 to H/K - 1 share key/value head 0, and so on."""

    def __init__(self, config: GLM4Config):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.heads, self.kv_heads = H, K
        self.q_proj = nn.Linear(C, H * D, bias=bias)
        self.k_proj = nn.Linear(C, K * D, bias=bias)
        self.v_proj = nn.Linear(C, K * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, rotation, positions, mask, cache):
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.heads, -1), *rotation)    # (B, T, H, D)
        k = rotate(self.k_proj(x).view(B, T, self.kv_heads, -1), *rotation)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, -1)
        if cache is not None:
            k = remember(cache[0], positions, k)                        # (B, M, K, D)
            v = remember(cache[1], positions, v)
        # --- attend: the same in llama3.py (tests/test_same.py) ---
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
    """SwiGLU: one half of a wide matrix gates the other, at each position by itself."""

    def __init__(self, config: GLM4Config):
        super().__init__()
        C, wide = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Linear(C, 2 * wide, bias=False)          # gate first
        self.down_proj = nn.Linear(wide, C, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then MLP: each reads the normed stream and adds to it, in 0414 normed again."""

    def __init__(self, config: GLM4Config):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(C, eps)     # its published name: before the MLP
        self.mlp = MLP(config)
        sandwich = config.sandwich_norms
        self.post_self_attn_layernorm = RMSNorm(C, eps) if sandwich else nn.Identity()
        self.post_mlp_layernorm = RMSNorm(C, eps) if sandwich else nn.Identity()

    def forward(self, x, rotation, positions, mask, cache):
        y = self.self_attn(self.input_layernorm(x), rotation, positions, mask, cache)
        x = x + self.post_self_attn_layernorm(y)
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))


class GLM4(nn.Module):
    """GLM: (B, T) ids -> (B, T, V) logits. Parameters are named as Hugging Face names them."""
    OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-8)
    L2WRAP = 0.0                             # RWKV's penalty on large logits: none here

    def __init__(self, config: GLM4Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Norms 1, biases 0, the rest normal; what adds to the stream, less with depth.

        The authors published none; their code descends from Megatron-LM, whose this is, and 0.02 is
        the initializer_range of the published configs.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
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
        weight = self.model.embed_tokens.weight
        wide = torch.promote_types(weight.dtype, torch.float32)         # at least fp32
        rotation = rotations(positions, self.config, wide)              # shared by the layers
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
        """Parameters for the optimiser: matrices decay, biases and norms do not."""
        return [{"params": [p for p in self.parameters() if (p.dim() > 1) == decay],
                 "lr_scale": 1.0, "decay": decay} for decay in (True, False)]

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu",
                        dtype: torch.dtype | None = None, **overrides) -> "GLM4":
        """Read a checkpoint, folder or file, in any layout named on top; memory holds it once.

        dtype None keeps the stored one; float16 overflows in 0414, bfloat16 does not.
        overrides: config fields that the file tells wrongly. The published glm-4-9b-chat-hf and
        -chat-1m-hf do: their config.json says rope_theta 10000, as transformers runs them, but they
        were trained with (and their twins in the original layout say) `rope_theta=5e6` and `1e8`.
        ValueError or OSError of one line if it is no such checkpoint.
        """
        path = Path(path)
        stated = (path if path.is_dir() else path.parent) / "config.json"
        config = read_config(stated)
        unknown = set(overrides) - {field.name for field in fields(config)}
        if unknown:
            raise ValueError(f"GLM4Config has no field {', '.join(sorted(unknown))}")
        with torch.device("meta"):                                      # shapes, no memory
            model = cls(replace(config, **overrides))
        stored = dequantised(read_tensors(path), read_json(stated).get("quantization_bit"))
        tensors = {name: tensor.to(device, dtype) for name, tensor in to_ours(stored, model.config)}
        try:
            model.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not fit its config: {reason}") from None
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json in the Hugging Face layout, each as a whole.

        That is Glm4 with `sandwich_norms`, else Glm, in which ChatGLM3 runs unchanged.
        """
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


RENAMED = {                                  # original layout: Hugging Face, and ours
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.layers.": "model.layers.",
    "self_attention.dense.": "self_attn.o_proj.",
    "mlp.dense_h_to_4h.": "mlp.gate_up_proj.",
    "mlp.dense_4h_to_h.": "mlp.down_proj.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
}
FIELDS = {                                   # config.json of the original layout: ours
    "padded_vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size", "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads", "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim", "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps", "rope_ratio": "rope_theta",
    "add_qkv_bias": "attention_bias",
}
UNPUBLISHED = {"sandwich_norms", "bos_id", "eos_ids", "pad_id"}         # names of ours alone
PLAIN = (                                    # what would be other mathematics if it were otherwise
    ("rmsnorm", True), ("post_layer_norm", True), ("multi_query_attention", True),
    ("apply_residual_connection_post_layernorm", False), ("add_bias_linear", False),
    ("hidden_act", "silu"), ("pre_seq_len", None), ("vision_config", None),
    ("quantization_config", None),
)


def dequantised(tensors, bits: int | None):
    """Yield the tensors, ChatGLM3's own int8 and int4 as the half-precision ones they stand for.

    A row is its integers times its scale. int4 packs two columns into a byte, the even one high
    (quantization.py beside the modeling file named on top).
    """
    waiting = {}                             # weights and scales whose other half is yet to come
    for name, tensor in tensors:
        if tensor.dtype != torch.int8 and not name.endswith(".weight_scale"):
            yield name, tensor
            continue
        waiting[name] = tensor
        name = name.removesuffix("_scale")
        if name in waiting and f"{name}_scale" in waiting:
            q, scale = waiting.pop(name), waiting.pop(f"{name}_scale")
            if q.dim() != 2 or scale.shape != q.shape[:1]:
                raise ValueError(f"{name} is {[*q.shape]}, its scales are {[*scale.shape]}")
            if bits == 4:
                q = torch.stack((q >> 4, q << 4 >> 4), dim=-1).flatten(-2)  # the sign comes along
            yield name, q * scale[:, None]


def to_ours(tensors, config: GLM4Config):
    """Yield (our name, our tensor) for each published one."""
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    for name, tensor in tensors:
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        if name == "transformer.rotary_pos_emb.inv_freq":               # saved, never used
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "self_attention.query_key_value." not in name:
            yield name, tensor
        elif len(tensor) != (H + 2 * K) * D:
            raise ValueError(f"{name} has {len(tensor)} rows, the config wants {(H + 2 * K) * D}")
        else:                                                           # the rows of q, of k, of v
            for letter, part in zip("qkv", tensor.split((H * D, K * D, K * D))):
                new = f"self_attn.{letter}_proj."
                yield name.replace("self_attention.query_key_value.", new), part


def read_config(path: Path) -> GLM4Config:
    """config.json of a GLM in either layout; ValueError if it asks for other mathematics."""
    stated = read_json(path)
    kind = stated.get("model_type")
    if kind not in ("chatglm", "glm", "glm4"):
        raise ValueError(f"{path} says model_type = {kind!r}: chatglm, glm and glm4 are supported")
    for name, plain in PLAIN:
        if stated.get(name) not in (None, plain):
            raise ValueError(f"{path} says {name} = {stated[name]!r}: only {plain!r} is supported")
    if kind == "chatglm":
        stated = {"rope_ratio": 1, "add_qkv_bias": False, **stated}
        absent = [name for name in FIELDS if type(stated.get(name)) not in (int, float, bool)]
        if absent:
            raise ValueError(f"{path} does not tell {', '.join(absent)}: it is neither ChatGLM3 "
                             "nor GLM-4 (the first ChatGLM-6B was another architecture)")
        sizes = {ours: stated[theirs] for theirs, ours in FIELDS.items()}
        sizes["rope_theta"] *= 10000.0       # it stretches the base, not the positions
        sizes["tie_word_embeddings"] = bool(stated.get("tie_word_embeddings"))
    else:
        rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
        scaled = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
        if scaled not in (None, "default"):
            raise ValueError(f"{path} scales RoPE by {scaled!r}, which is not supported: take "
                             "rope_scaling out of it and stay within max_position_embeddings")
        own = {field.name for field in fields(GLM4Config)} - UNPUBLISHED
        sizes = {name: value for name, value in {**stated, **rope}.items()
                 if name in own and value is not None}
        sizes["sandwich_norms"] = kind == "glm4"
    eos = stated.get("eos_token_id")
    eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return GLM4Config(**sizes, bos_id=stated.get("bos_token_id"), eos_ids=eos,
                      pad_id=stated.get("pad_token_id"))


def published_config(config: GLM4Config, dtype: torch.dtype) -> dict:
    """What config.json says of a model whose weights have this dtype."""
    sizes = {name: value for name, value in asdict(config).items()
             if name not in UNPUBLISHED}
    kind = "Glm4" if config.sandwich_norms else "Glm"
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"architectures": [f"{kind}ForCausalLM"], "model_type": kind.lower(), **sizes,
            "hidden_act": "silu", "torch_dtype": str(dtype).removeprefix("torch."),
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
        model = GLM4.from_pretrained(args.weights, device, getattr(torch, args.dtype or "", None))
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
