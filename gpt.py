"""GPT-2 in one file: build it, train it, load the published weights, generate.

The whole forward pass. Each block reads the residual stream x (T, C) and adds to it twice:

    x = wte[token] + wpe[position]
    L times:
        q, k, v = LN(x) W_attn + b                  split into H heads of D channels, C = H D
        y = softmax(q kᵀ / √D + mask) v             per head; mask: -∞ for what comes later
        x = x + concat(y) W_o + b                   concat: the heads side by side again
        x = x + GELU(LN(x) W_fc + b) W_out + b      C -> 4 C -> C channels
    logits = LN(x) wteᵀ

    LN(x) = (x - mean(x)) / √(var(x) + ε) * weight + bias           over the channels
    GELU(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))              close to x Φ(x)

In training, dropout follows the embeddings, the softmax, W_o and W_out. Llama 3 and GLM-4 change
six things: learned positions, which end at `n_positions`; LayerNorm; most biases; keys and values
for every head; the MLP; and the head, which is the token table (tied weights).

    B batch   T time   C channels (n_embd)   H heads   D head size   L layers   V vocabulary
    M cache capacity in tokens

References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners";
openai/gpt-2@9b63575 src/model.py; karpathy/nanoGPT@3adf61e model.py. Loads GPT-2 in the Hugging
Face layout (safetensors or bin, keys with or without `transformer.`) and nanoGPT's ckpt.pt.

    model = GPT.from_pretrained("path/to/gpt2")             # or GPT(SIZES["gpt2"]), untrained
    [new] = model.generate([[464, 3290]], 20, temperature=0.8, top_k=50, seed=1)
    model.save_pretrained("copy")                           # transformers opens it
    tokens = torch.tensor([[464, 3290, 318, 257]])          # (B, T) "The dog is a"; to train:
    model.train()                                           # dropout on
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

GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}   # -> nn.GELU's name


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT-2, named as in the published config.json."""
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int = 3072
    activation_function: str = "gelu_new"    # OpenAI's tanh form; nanoGPT has the exact "gelu"
    layer_norm_epsilon: float = 1e-5
    bias: bool = True                        # False, as in nanoGPT's train.py: no bias anywhere
    tie_word_embeddings: bool = True
    embd_pdrop: float = 0.0                  # dropout in training: after the embeddings,
    attn_pdrop: float = 0.0                  # on the attention weights,
    resid_pdrop: float = 0.0                 # on what each half of a block adds
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if name.startswith(("vocab", "n_")) and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
            if name.endswith(("pdrop", "epsilon")) and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}: it must be in [0, 1)")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.activation_function not in GELUS:
            raise ValueError(f"activation_function {self.activation_function!r} not in {[*GELUS]}")

    context = property(lambda self: self.n_positions, doc="The longest sequence.")

    @classmethod
    def sized(cls, layers: int, width: int, vocab_size: int, context: int) -> "GPTConfig":
        """GPT-2 of this depth and width: heads of 64 channels or more, an MLP 4 x as wide."""
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        return cls(vocab_size, context, width, layers, heads, n_inner=4 * width)


OPENAI = dict(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1,
              bos_token_id=50256, eos_token_id=50256)
SIZES = {          # vocab_size, n_positions, n_embd, n_layer, n_head, n_inner     parameters
    "gpt2": GPTConfig(50257, 1024, 768, 12, 12, 3072, **OPENAI),                # 124,439,808
    "gpt2-medium": GPTConfig(50257, 1024, 1024, 24, 16, 4096, **OPENAI),        # 354,823,168
    "gpt2-large": GPTConfig(50257, 1024, 1280, 36, 20, 5120, **OPENAI),         # 774,030,080
    "gpt2-xl": GPTConfig(50257, 1024, 1600, 48, 25, 6400, **OPENAI),            # 1,557,611,200
}


class Attention(nn.Module):
    """Causal self-attention: softmax(q kᵀ / √D + mask) v in every head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, self.dropout = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)   # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, mask, cache):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, T, D)
        if cache is not None:
            keys, values, place = cache
            k, v = store(keys, place, k), store(values, place, v)       # (B, H, slots, D)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1)    # (B, H, T, D); T = 1 would see only key 0
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
    """Attention, then MLP: each reads the normed residual stream and adds to it."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.resid_pdrop)

    def forward(self, x, mask, cache):
        x = x + self.drop(self.attn(self.ln_1(x), mask, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class State(NamedTuple):
    """The KV cache of a batch, preallocated and updated in place."""
    position: Tensor                         # (B,) int64: number of tokens seen, row by row
    key: Tensor                              # (B, L, H, M, D), in the parameters' dtype
    value: Tensor                            # (B, L, H, M, D)

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


class GPT(nn.Module):
    """GPT-2: (B, T) tokens -> (B, T, V) logits. Parameters are named as in the published files."""
    OPTIMIZER = dict(betas=(0.9, 0.95), eps=1e-8)

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C, V = config.n_embd, config.vocab_size
        self.wte = nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.n_positions, C), freeze=False)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, config.layer_norm_epsilon, bias=config.bias)
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        if not self.wte.weight.is_meta:      # on meta, drawing takes seconds
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As the GPT-2 paper (§2.3) and its code: normal with std 0.02, positions 0.01, residual
        projections scaled by 1/√(2 L); norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "ln_" in name:
                parameter.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                parameter.normal_(std=0.01 if name == "wpe.weight" else 0.02)

    def hidden(self, tokens: Tensor, state: State | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) after the final norm. With a state, the tokens continue the
        cached sequence, and it advances by T. ValueError if they do not fit."""
        positions, mask, caches = look_back(tokens, state, self.config.n_positions)
        x = self.drop(self.wte(tokens) + self.wpe(positions))           # (B, T, C)
        for block, cache in zip(self.h, caches):
            x = block(x, mask, cache)
        if state is not None:
            state.position.add_(tokens.shape[1])
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V): the head, for a loss that is computed piece by piece."""
        return self.lm_head(hidden)

    def forward(self, tokens: Tensor, state: State | None = None, last: bool = False) -> Tensor:
        """(B, T) tokens -> (B, T, V): logits of every position, or (B, 1, V) of the last one."""
        hidden = self.hidden(tokens, state)
        return self.lm_head(hidden[:, -1:] if last else hidden)

    def new_state(self, batch_size: int, max_tokens: int) -> State:
        """An empty cache for `batch_size` rows of `max_tokens` tokens, at most the context."""
        c, like = self.config, self.wte.weight
        shape = batch_size, c.n_layer, c.n_head, min(max_tokens, c.context), c.n_embd // c.n_head
        return State(like.new_zeros(batch_size, dtype=torch.int64), like.new_zeros(shape),
                     like.new_zeros(shape))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Every parameter once, in groups for torch.optim.AdamW: only matrices decay. AdamW ignores
        two keys, which train.py reads: `lr_scale`, a factor of the learning rate, and
        `hidden_matrix`, true for the 2-D matrices inside the blocks (for optimisers like Muon)."""
        blocks, tables, vectors = [], [], []
        for name, p in self.named_parameters():
            (vectors if p.dim() < 2 else blocks if name.startswith("h.") else tables).append(p)
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
                        dtype: torch.dtype | None = None, **overrides) -> "GPT":
        """Read a checkpoint, folder or file, in any layout named on top; memory holds it once.

        dtype None keeps the stored one. overrides: config fields that the file states wrongly.
        """
        path = Path(path, "ckpt.pt") if Path(path, "ckpt.pt").exists() else Path(path)
        config, tensors = read_nanogpt(path) if path.suffix == ".pt" else read_hugging_face(path)
        config = replace(config, **overrides)
        weights = {name: nn.Parameter(tensor.to(device, dtype)) for name, tensor in tensors}
        if config.tie_word_embeddings:       # a head that differs from the table wins: then untied
            head, table = weights.get("lm_head.weight"), weights["wte.weight"]
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
        dtype = str(self.wte.weight.dtype).removeprefix("torch.")
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
                  "torch_dtype": dtype, "dtype": dtype, "n_ctx": self.config.n_positions,
                  **asdict(self.config), "bias": True}                  # to_published adds zeros
        save_file(to_published(self), f"{weights}.part", {"format": "pt"})
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


def read_hugging_face(path: Path):
    """(config, tensors) of a Hugging Face GPT-2."""
    folder = path if path.is_dir() else path.parent
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, plain in (("model_type", "gpt2"), ("scale_attn_weights", True),
                        ("scale_attn_by_inverse_layer_idx", False),
                        ("reorder_and_upcast_attn", False), ("add_cross_attention", False)):
        if stated.get(name, plain) != plain:
            raise ValueError(f"{folder} has {name} = {stated[name]!r}: only {plain!r} is supported")
    sizes = {field.name: stated[field.name] for field in fields(GPTConfig)
             if stated.get(field.name) is not None}
    sizes.setdefault("n_inner", 4 * sizes.get("n_embd", GPTConfig.n_embd))
    return GPTConfig(**sizes), to_ours(read_tensors(path), transposed=True)


def read_nanogpt(path: Path):
    """(config, tensors) of nanoGPT's ckpt.pt; of another .pt, a state dict beside a config.json.

    nanoGPT had the tanh GELU until June 2023 (PR #274), then the exact one. Without `bias`, it is
    from before January 2023: tanh. One from between has to be told: activation_function="gelu_new".
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if "model_args" not in content:
        return read_hugging_face(path)
    tensors = dict(to_ours(read_tensors(path), transposed=False))
    stated = {"vocab_size": len(tensors["wte.weight"]), **content["model_args"]}
    p = stated.pop("dropout", 0.0)
    gelu = "gelu" if "bias" in stated else "gelu_new"
    config = GPTConfig(n_positions=stated.pop("block_size"), n_inner=4 * stated["n_embd"],
                       activation_function=gelu, embd_pdrop=p, attn_pdrop=p, resid_pdrop=p,
                       **stated)             # a TypeError for arguments that only forks have
    return config, tensors.items()


def to_ours(tensors, transposed: bool):
    """Yield (our name, our tensor), without mask buffers and a classifier's head; Hugging Face's
    matrices are (in, out)."""
    for name, tensor in tensors:
        if not name.endswith((".attn.bias", ".attn.masked_bias")) and name != "score.weight":
            turned = transposed and name.startswith("h.") and tensor.dim() == 2
            yield name, tensor.t().contiguous() if turned else tensor


def to_published(model: GPT) -> dict[str, Tensor]:
    """Hugging Face's tensors: matrices as (in, out), and biases, of zero where we have none."""
    published = {}
    for name, tensor in model.state_dict().items():
        matrix = name.startswith("h.") and tensor.dim() == 2
        published[name] = (tensor.t() if matrix else tensor).contiguous()
        if not model.config.bias and name.startswith(("h.", "ln_f.")):
            published[name.replace("weight", "bias")] = tensor.new_zeros(len(tensor))
    if model.config.tie_word_embeddings:
        del published["lm_head.weight"]
    return published
