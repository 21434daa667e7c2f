"""GPT-2 in one file: build it, train it, load the published weights, generate.

A stack of blocks that read one residual stream and add to it:

    x = wte[token] + wpe[position]
    each block:  x += attention(layer_norm(x));  x += mlp(layer_norm(x))
    logits = layer_norm(x) @ wte.T

The other models of this project are best read as departures from this one. What is GPT-2's own:

* positions are learned vectors, added once at the bottom: there are none beyond `n_positions`;
* LayerNorm (mean, variance, bias) before each half of a block, and once at the end;
* every head has keys and values of its own;
* the MLP is one GELU between two matrices, four times as wide as the stream;
* the head is the token table again (tied).

    B batch   T time   C channels (n_embd)   H heads   D head size   L layers   V vocabulary
    M the most ids that a state can hold

References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
openai/gpt-2@9b63575 src/model.py; karpathy/nanoGPT@3adf61e model.py.

Loads GPT-2 in the Hugging Face layout (model.safetensors or pytorch_model.bin, keys with or
without `transformer.`) and nanoGPT's ckpt.pt. Writes the Hugging Face layout.

    model = GPT.from_pretrained("path/to/gpt2")             # or GPT(SIZES["gpt2"]), untrained
    logits = model(torch.tensor([[464, 3290]]))             # (B, T) ids -> (B, T, V)
    [new] = model.generate([[464, 3290]], 20, temperature=0.8, top_k=50, seed=1)
    model.save_pretrained("copy")                           # transformers opens it
"""
import argparse
import itertools
import json
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

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}   # the name in torch


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2, by the names of the published config.json."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_new"    # OpenAI's tanh form; nanoGPT has the exact "gelu"
    layer_norm_epsilon: float = 1e-5
    bias: bool = True                        # False, nanoGPT's default: no bias anywhere
    tie_word_embeddings: bool = True
    embd_pdrop: float = 0.0                  # dropout, in training: after the embeddings,
    attn_pdrop: float = 0.0                  # on the attention weights,
    resid_pdrop: float = 0.0                 # on what each half of a block adds
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, not {getattr(self, name)!r}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon"):
            if type(getattr(self, name)) not in (int, float) or not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")
        if self.activation_function not in GELUS:
            raise ValueError(f"activation_function {self.activation_function!r} not in {[*GELUS]}")

    @property
    def context(self) -> int:
        """The most ids that the model can see."""
        return self.n_positions

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "GPTConfig":
        """GPT-2 of this depth and width: heads of about 64 channels, an MLP four times as wide."""
        heads = max(1, width // 64)
        while width % heads:
            heads -= 1
        return cls(vocab_size, context, width, layers, heads, n_inner=4 * width)


OPENAI = dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1, bos_id=50256, eos_ids=(50256,))
SIZES = {
    "gpt2": GPTConfig(**OPENAI),                                                # 124,439,808
    "gpt2-medium": GPTConfig(50257, 1024, 1024, 24, 16, 4096, **OPENAI),        # 354,823,168
    "gpt2-large": GPTConfig(50257, 1024, 1280, 36, 20, 5120, **OPENAI),         # 774,030,080
    "gpt2-xl": GPTConfig(50257, 1024, 1600, 48, 25, 6400, **OPENAI),            # 1,557,611,200
}


@dataclass
class State:
    """What a batch remembers: the keys and values of every layer, in the parameters' dtype."""
    position: Tensor                         # (B,) int64: how many ids each row has seen
    key: Tensor                              # (B, L, M, H, D)
    value: Tensor                            # (B, L, M, H, D)

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
    """Write `new` (B, T, H, D) into `cache` (B, M, H, D) at `positions` (B, T); the whole cache.

    What was there is data: under autograd, gradients reach `new` and nothing before it.
    """
    rows = torch.arange(len(cache), device=cache.device)[:, None]       # (B, 1)
    cache[rows, positions] = new.detach().to(cache.dtype)
    whole = cache.to(new.dtype)                                         # differs under autocast
    return whole.index_put((rows, positions), new) if torch.is_grad_enabled() else whole


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, self.head_size = config.n_head, config.head_size
        self.dropout = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, positions, mask, cache):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.heads, self.head_size).unbind(2)  # (B, T, H, D)
        if cache is not None:
            k = remember(cache[0], positions, k)                        # (B, M, H, D)
            v = remember(cache[1], positions, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)   # (B, H, T or M, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with a GELU between them, at each position by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, bias=config.bias)
        self.gelu = nn.GELU(approximate=GELUS[config.activation_function])
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention, then MLP: each reads the normed stream and adds to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x, positions, mask, cache):
        x = x + self.drop(self.attn(self.ln_1(x), positions, mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2: (B, T) ids -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-8)
    L2WRAP = 0.0                             # RWKV's penalty on large logits: none here

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.n_embd)
        self.wte = nn.Embedding.from_pretrained(table, freeze=False)
        self.wpe = nn.Embedding.from_pretrained(table.new_empty(config.n_positions, config.n_embd),
                                                freeze=False)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if not table.is_meta:                # drawing would only cost a second there
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Norms 1, biases 0, the rest normal; what adds to the stream, less with depth (§2.3)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
            elif name.endswith("c_proj.weight"):                        # 2 n_layer of them add up
                parameter.normal_(std=0.02 / (2 * self.config.n_layer) ** 0.5)
            else:
                parameter.normal_(std=0.01 if name == "wpe.weight" else 0.02)

    def new_state(self, batch_size: int, max_tokens: int) -> State:
        """An empty memory for `batch_size` rows of at most `max_tokens` ids each."""
        config, like = self.config, self.wte.weight
        shape = (batch_size, config.n_layer, max_tokens, config.n_head, config.head_size)
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
        x = self.drop(self.wte(tokens) + self.wpe(positions))           # (B, T, C)
        for i, block in enumerate(self.h):
            cache = None if state is None else (state.key[:, i], state.value[:, i])
            x = block(x, positions, mask, cache)
        if state is not None:
            state.position += tokens.shape[1]
        return self.ln_f(x)

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
        return F.linear(hidden, self.wte.weight) if tied else self.lm_head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) ids -> (B, T, V): logits of every position."""
        return self.logits(self.hidden(tokens, state), state)

    def parameter_groups(self) -> list[dict]:
        """Parameters for the optimiser: matrices decay, biases and norms do not."""
        return [{"params": [p for p in self.parameters() if (p.dim() > 1) == decay],
                 "lr_scale": 1.0, "decay": decay} for decay in (True, False)]

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu",
                        dtype: torch.dtype | None = None, **overrides) -> "GPT":
        """Read a checkpoint, folder or file, in any layout named on top; memory holds it once.

        dtype None keeps the stored one. overrides: config fields that the file tells wrongly.
        ValueError or OSError of one line if it is no such checkpoint.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file or folder")
        path = path / "ckpt.pt" if (path / "ckpt.pt").exists() else path
        nanogpt, folder = path.suffix == ".pt", path if path.is_dir() else path.parent
        config = read_nanogpt_config(path) if nanogpt else read_config(folder / "config.json")
        unknown = set(overrides) - {field.name for field in fields(config)}
        if unknown:
            raise ValueError(f"GPTConfig has no field {', '.join(sorted(unknown))}")
        with torch.device("meta"):                                      # shapes, no memory
            model = cls(replace(config, **overrides))
        tensors = {name: tensor.to(device, dtype) for name, tensor
                   in to_ours(read_tensors(path), model.config, transposed=not nanogpt)}
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
        save_file(to_published(self.state_dict(), self.config), f"{weights}.part", {"format": "pt"})
        config = json.dumps(published_config(self.config, self.wte.weight.dtype), indent=2)
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


MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")           # saved, but no parameter
MATRIX = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")               # published as (in, out)


def to_ours(tensors, config: GPTConfig, transposed: bool):
    """Yield (our name, our tensor) for each published one."""
    for name, tensor in tensors:
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if MASK_BUFFER.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        yield name, tensor.t().contiguous() if transposed and MATRIX.fullmatch(name) else tensor


def to_published(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Ours as Hugging Face has them: matrices transposed, and biases, of zero if we have none."""
    published = {}
    for name, tensor in tensors.items():
        published[name] = (tensor.t() if MATRIX.fullmatch(name) else tensor).contiguous()
        if not config.bias and ("ln_" in name or MATRIX.fullmatch(name)):
            published[name.replace("weight", "bias")] = tensor.new_zeros(len(tensor))
    return published


def read_config(path: Path) -> GPTConfig:
    """config.json of a Hugging Face GPT-2; ValueError if it asks for other mathematics."""
    stated = read_json(path)
    for name, plain in (("model_type", "gpt2"), ("scale_attn_weights", True),
                        ("scale_attn_by_inverse_layer_idx", False),
                        ("reorder_and_upcast_attn", False), ("add_cross_attention", False)):
        if stated.get(name, plain) != plain:
            raise ValueError(f"{path} says {name} = {stated[name]!r}: only {plain!r} is supported")
    own = {field.name for field in fields(GPTConfig)} - {"bias"}
    sizes = {name: value for name, value in stated.items() if name in own and value is not None}
    if "n_embd" in sizes:
        sizes.setdefault("n_inner", 4 * sizes["n_embd"])
    eos = stated.get("eos_token_id")
    return GPTConfig(**sizes, bos_id=stated.get("bos_token_id"), pad_id=stated.get("pad_token_id"),
                     eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def published_config(config: GPTConfig, dtype: torch.dtype) -> dict:
    """What config.json says of a model whose weights have this dtype."""
    sizes = {name: value for name, value in asdict(config).items()
             if name not in ("bias", "bos_id", "eos_ids", "pad_id")}
    eos = config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": config.bos_id, "eos_token_id": eos, "pad_token_id": config.pad_id}


def read_nanogpt_config(path: Path) -> GPTConfig:
    """The model_args of nanoGPT's ckpt.pt. Its GELU is the exact one (since its PR #274)."""
    stated = read_pickle(path).get("model_args")
    names = ("vocab_size", "block_size", "n_embd", "n_layer", "n_head")
    if not isinstance(stated, dict) or not set(names) <= set(stated):
        raise ValueError(f"{path} is no checkpoint of nanoGPT: its model_args lack sizes")
    p = stated.get("dropout", 0.0)
    return GPTConfig(*[stated[name] for name in names], 4 * stated["n_embd"], "gelu",
                     bias=stated.get("bias", True), embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)


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
        model = GPT.from_pretrained(args.weights, device, getattr(torch, args.dtype or "", None))
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
