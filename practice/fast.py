"""Faster generation from outside the model files: linear layers, and speculative decoding.

    print(accelerate(model, weights="int8"))    # replaces the linear layers; says by what and why
    speculation = Speculation(gpt.probabilities, draft=small)           # draft None: from the text
    [new] = speculation.generate(model, [prompt], 200, temperature=0.8) # as model.generate
    print(speculation.report())

A new token costs one read of all weights: at batch size 1, time is bytes over memory bandwidth. So
the first half of this file makes products faster or weights smaller, and the second half has one
read of the weights check several proposed tokens.
"""
import contextlib
import functools
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------- linear layers
# N outputs   K inputs   G group size of int4   n rows of the weight, some of N


class Replacement(nn.Module):
    """x Wᵀ + b, as the nn.Linear that it replaces, for inputs that want no gradient of W."""
    MOST = math.inf                          # of more inputs at once, W is multiplied in blocks

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.shape = linear.weight.shape
        self.bias = None if linear.bias is None else linear.bias.detach()

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """Whether this kind can hold a weight."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.reshape(-1, self.shape[1])
        if not 0 < len(inputs) <= self.MOST or torch.is_grad_enabled():
            y = self.in_blocks(inputs)
        else:
            y = self.product(inputs)
        return y.to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def product(self, x: Tensor) -> Tensor:
        """(inputs, K) -> (inputs, N), by an operator of torch that reads the stored weight."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of W in fp32."""
        raise NotImplementedError

    def in_blocks(self, x: Tensor) -> Tensor:
        """The same through blocks of W that fit a cache, in a dtype that this CPU is fast in."""
        wide = x if x.device.type != "cpu" or product_in_bf16() else x.float()
        step = max(64, 2 ** 18 // self.shape[1] // 64 * 64)
        y = torch.cat([F.linear(wide, self.rows(i, i + step).to(wide.dtype))
                       for i in range(0, self.shape[0], step)], -1)
        return y if self.bias is None else y + self.bias


def product_in_bf16() -> bool:
    """Whether oneDNN has products in bf16 here (AVX512 or newer)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class OneDNN(Replacement):
    """The same numbers, in the order in which oneDNN's product reads them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight.to_dense()[start:stop].float()

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Half(Replacement):
    """fp16 in FBGEMM's layout, multiplied in fp32: for CPUs that have no products in 16 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        bias = None if self.bias is None else self.bias.float()
        self.packs = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach().float(), bias)

    @staticmethod
    def holds(weight: Tensor) -> bool:
        """fp16 is exact but for what bf16 has below 2 ** -17, and ends at 65504."""
        return all((part.half() - part).norm() <= 2 ** -16 * part.norm()
                   for part in weight.detach().float().split(1024))

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self.packs)[0][start:stop].float()

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packs)


class Int8(Replacement):
    """W = weight * scale: 8 bits per weight and a scale for each row. Multiplied in bf16."""
    MOST = 32

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.padding = -linear.in_features % 32                         # to whole vectors
        w = linear.weight.detach().float()
        # a scale is rounded before it is used
        self.scale = (w.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
        w = (w / self.scale.float()[:, None]).round_().clamp_(-127, 127)
        self.weight = F.pad(w.to(torch.int8), (0, self.padding))

    def rows(self, start: int, stop: int) -> Tensor:
        weight = self.weight[start:stop, :self.shape[1]].float()
        return weight * self.scale[start:stop, None].float()

    def product(self, x: Tensor) -> Tensor:
        x = x.bfloat16()
        if self.padding:
            x = F.pad(x, (0, self.padding))
        elif x.data_ptr() % 32:              # the operator crashes there
            x = x.clone()
        y = torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class Int8Pairs(Replacement):
    """The same for CPUs with AVX2, by FBGEMM's product of 8-bit inputs and 8-bit weights.

    AVX2 adds two products of 8 bits in 16 bits: a scale is so large that the two neighbours
    cannot overflow. 8 bits are too few for inputs that hold outliers, so each input becomes two,
    256 apart. Both are multiplied by one read of the weights, at almost no cost.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        w = linear.weight.detach().float()
        pairs = F.pad(w, (0, w.shape[1] % 2)).abs().unflatten(1, (-1, 2)).sum(-1)
        scale = torch.maximum(w.abs().amax(1) / 127, pairs.amax(1) / 127).clamp(min=1e-30)
        bias = None if self.bias is None else self.bias.float() / (1 + 1 / 256)     # added twice
        with warnings.catch_warnings():      # of an interface that may go
            warnings.simplefilter("ignore")
            weight = torch.quantize_per_channel(w, scale.double(), torch.zeros(len(w)).long(), 0,
                                                torch.qint8)
        self.packs = torch.ops.quantized.linear_prepack(weight, bias)

    def rows(self, start: int, stop: int) -> Tensor:
        return torch.ops.quantized.linear_unpack(self.packs)[0][start:stop].dequantize()

    def product(self, x: Tensor) -> Tensor:
        x = x.float()
        step = (torch.linalg.vector_norm(x, math.inf).item() or 1.0) / 127
        high = torch.fake_quantize_per_tensor_affine(x, step, 0, -127, 127)
        both = torch.cat([high, torch.sub(x, high).mul_(256)])          # ± 127, ± 128 steps
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            both, step, 128, self.packs)
        return torch.add(y[:len(x)], y[len(x):], alpha=1 / 256)


class Int4(Replacement):
    """W = weight * scale + zero with weight in -8 ... 7, scale and zero for each G inputs of a row.

    4 bits per weight, and 32 bits for a scale and a zero: 5 bits in all with G = 32.
    """
    MOST = 256                               # to undo `pack` takes long
    GROUP = 32                               # torch's operator also has 64, 128 and 256

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.padding = -self.shape[1] % self.GROUP
        parts = [self.quantise(rows) for rows in linear.weight.detach().split(4096)]
        weight, scale = zip(*parts)
        self.weight = torch.cat(weight)                                 # (N, K / 2), see pack
        self.scale = torch.cat(scale).transpose(0, 1).contiguous()      # (K / G, N, 2)

    def quantise(self, w: Tensor):
        w = F.pad(w.float(), (0, self.padding, 0, -len(w) % 64)).unflatten(1, (-1, self.GROUP))
        low, high = w.aminmax(dim=-1, keepdim=True)                     # (n, K / G, 1)
        scale = ((high - low) / 15).clamp(min=1e-30).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        weight = ((w - zero.float()) / scale.float()).round_().clamp_(-8, 7).add_(8).flatten(1)
        return pack(weight), torch.cat([scale, zero], -1)

    def rows(self, start: int, stop: int) -> Tensor:
        """start is a multiple of 64."""
        bytes, K = self.weight[start:stop + -stop % 64], self.shape[1] + self.padding
        weight = torch.stack([bytes & 15, bytes >> 4], -1).view(-1, 64 * K)
        weight = weight.index_select(1, order(K, bytes.device)).view(-1, K // self.GROUP,
                                                                     self.GROUP)
        scale, zero = self.scale[:, start:start + len(weight)].transpose(0, 1).float().split(1, -1)
        weight = ((weight.float() - 8) * scale + zero).flatten(1)
        return weight[:min(stop, self.shape[0]) - start, :self.shape[1]]

    def product(self, x: Tensor) -> Tensor:
        x = F.pad(x.bfloat16(), (0, self.padding))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.GROUP, self.scale)
        return y[:, :self.shape[0]] if self.bias is None else y[:, :self.shape[0]] + self.bias


def pack(weight: Tensor) -> Tensor:
    """(n, K) values 0 ... 15 -> (n, K / 2) bytes, n a multiple of 64: on CPUs as torch's operator
    wants them, which depends on the CPU."""
    try:
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.int(), 1)
    except (NotImplementedError, AttributeError):
        weight = weight.to(torch.uint8)
        return weight[:, ::2] | weight[:, 1::2] << 4


@functools.cache
def order(K: int, device) -> Tensor:
    """(64 K,) where `pack` puts each value of 64 rows: found by packing the places' own digits."""
    place = torch.arange(64 * K, device=device).view(64, K)
    found = torch.zeros(64 * K, dtype=torch.int64, device=device)
    for shift in range(0, (64 * K).bit_length(), 4):
        bytes = pack(place >> shift & 15)
        found += torch.stack([bytes & 15, bytes >> 4], -1).view(-1).long() << shift
    return found.argsort()


class Int8Blocks(Int8):
    """Int8 without its operator."""
    MOST = -1


class Int4Blocks(Int4):
    """Int4 without its operator."""
    MOST = -1


KINDS = {None: {"oneDNN's": OneDNN, "FBGEMM's fp16": Half},
         "int8": {"plain": Int8Blocks, "torch's": Int8, "FBGEMM's": Int8Pairs},
         "int4": {"plain": Int4Blocks, "torch's": Int4}}
TOKENS = 1, 64                               # operators are measured on a new token and a prompt


def accelerate(model: nn.Module, weights: str | None = None, fast: str = "auto") -> str:
    """Replace every nn.Linear of a model, for generation; returns a line that says by what and why.

    weights: "int8" or "int4", or None: as they are. fast: "auto" takes the products that are
    quickest on this machine, measured once; "off" plain ones. A tied head is replaced like any
    other layer, and the embedding table stays as it is. Not for a model to be saved or trained.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    device, dtype = linears[0].weight.device.type, linears[0].weight.dtype
    name, why = "plain", "--fast off"
    if fast != "off" and device != "cpu":
        why = f"other products are for CPUs, this is {device}"
    elif fast != "off":
        name, why = choose(timings(linears, weights), weights)
    kind, kept = KINDS[weights].get(name), 0
    for parent in [*model.modules()] if kind else []:
        for name, child in [*parent.named_children()]:
            if type(child) is nn.Linear:
                if kind.holds(child.weight):
                    setattr(parent, name, kind(child))
                else:
                    kept += 1
    if kept:
        why += f"; {kept} layers stay as they were, fp16 cannot hold them"
    return f"{weights or str(dtype).removeprefix('torch.')} weights, {why}"


def choose(times: dict[str, list[float]], weights: str | None) -> tuple[str, str]:
    """(name, why): the quickest for a reply of 100 tokens to a prompt of 400."""
    def reply(name):                         # a gain of less than 5 % is noise
        token, prompt = times[name]
        return (100 * token + 400 / TOKENS[1] * prompt) * (0.95 if name == "linear" else 1)
    without = min(times.keys() & {"linear", *KINDS[None]}, key=reply)
    if weights is None and without == "linear":
        return "plain", "torch's own products: no others are quicker here, as measured"
    name = min(times.keys() & {*KINDS[weights]}, key=reply)
    other = "linear" if weights is None else without
    token, prompt = (a / b for a, b in zip(times[other], times[name]))
    slower = "; SLOWER than without" if weights and token < 0.95 else ""
    return name, (f"{name} products: {token:.2f} x the speed of "
                  f"{'plain' if weights is None else 'unquantised'} ones for a new token, "
                  f"{prompt:.2f} x in prompts, as measured here{slower}")


def timings(linears: list[nn.Linear], weights: str | None) -> dict[str, list[float]]:
    """{products: [seconds for 1 and 64 tokens]} of layers like these; "linear": the layers.

    With those of unquantised weights, to compare. Measured once for a processor, a torch and a set
    of shapes, and kept in the user's cache folder. Products that are missing here, or refuse this
    dtype, are left out.
    """
    some = first(linears, 2 ** 25)           # more than the processor's cache holds
    some.append(part(linears[-1], 2 ** 24))  # of the head, which is larger than the others
    dtype, kinds = some[0].weight.dtype, KINDS[None] | KINDS[weights]
    if dtype == torch.float32:
        kinds.pop("FBGEMM's fp16")           # rounds
    shapes = sorted({"x".join(map(str, layer.weight.shape)) for layer in some})
    key = (f"torch {torch.__version__}, {processor()}, {torch.get_num_threads()} threads, "
           f"{dtype}, {weights}, {', '.join(kinds)}, {' '.join(shapes)}")
    return remembered(key, lambda: measure(some, kinds))


def first(linears: list[nn.Linear], size: int) -> list[nn.Linear]:
    """Layers from the first on, until they have this number of weights."""
    some = linears[:1]
    for linear in linears[1:]:
        if sum(layer.weight.numel() for layer in some) < size:
            some.append(linear)
    return some


def part(linear: nn.Linear, size: int) -> nn.Linear:
    """The first outputs of a layer, with at most this number of weights."""
    weight = linear.weight.detach()[:max(1, size // linear.in_features)]
    some = nn.Linear(linear.in_features, len(weight), bias=False, device="meta")
    some.weight = nn.Parameter(weight)
    return some


@torch.inference_mode()
def measure(linears: list[nn.Linear], kinds: dict[str, type]) -> dict[str, list[float]]:
    """The best of some passes of each kind that gives the right result, in turns."""
    x = [torch.randn(1, linear.in_features).to(linear.weight.dtype) for linear in linears]
    right, layers = F.linear(x[0], linears[0].weight, linears[0].bias).float(), {"linear": linears}
    for name, kind in kinds.items():         # a trial call
        with contextlib.suppress(RuntimeError, AttributeError):
            made = [kind(linear) for linear in linears]
            error = (made[0](x[0]).float() - right).norm() / right.norm()
            if error < 0.3:                  # int4 of random weights has 0.1; NaN is no number
                layers[name] = made
    times, size = {name: [] for name in layers}, sum(layer.weight.numel() for layer in linears)
    for tokens in TOKENS:
        # a prompt's time is arithmetic, which needs fewer layers
        used = linears if tokens == 1 else first(linears, 2 ** 22)
        share = sum(layer.weight.numel() for layer in used) / size
        best = dict.fromkeys(layers, math.inf)
        for turn in range(15):
            for name, made in layers.items():
                if turn > 4 and best[name] > 3 * min(best.values()):
                    continue                 # it will not win
                start = time.perf_counter()
                for layer, one in zip(made[:len(used)], x):
                    layer(one.expand(tokens, -1))
                best[name] = min(best[name], time.perf_counter() - start)
        for name in layers:
            times[name].append(best[name] / share)
    return times


def processor() -> str:
    """The processor's name and the vector instructions that torch uses."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


def remembered(key: str, compute) -> dict[str, list[float]]:
    """compute(), or what it gave before under this key: a cache that fails only costs time."""
    def usable(times):                       # another version of this file may have written it
        return isinstance(times, dict) and "linear" in times and all(
            isinstance(found, list) and len(found) == len(TOKENS)
            and all(isinstance(seconds, float) for seconds in found) for found in times.values())
    known, path = {}, None
    with contextlib.suppress(OSError, ValueError, TypeError, RuntimeError):     # the last: no home
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        path = Path(folder, "language-models", "linears.json")
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    if not usable(known.get(key)):
        known[key] = compute()
        with contextlib.suppress(OSError, AttributeError):              # the last: no path
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}")
            part.write_text(json.dumps(known, indent=1), encoding="utf-8")
            os.replace(part, path)
    return known[key]

# ---------------------------------------------------------------------------- speculative decoding
# p what the model would draw from   q what the proposals were drawn from   (V,) each, fp64


def accept(proposed: list[int], q: list[Tensor] | None, p, generator) -> list[int]:
    """A prefix of `proposed`, and one token more: together distributed as if drawn from p alone.

    Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1.
    A proposed token x stays with probability min(1, p(x) / q(x)); else the token at its place is
    drawn from max(p - q, 0). q None: proposals were certain, q(x) = 1. p: place -> (V,).
    """
    for i, token in enumerate(proposed):
        target = p(i)
        proposal = torch.zeros_like(target).index_fill_(0, torch.tensor(token), 1.0)
        proposal = proposal if q is None else q[i]
        draw = torch.rand((), generator=generator, dtype=torch.float64)
        if draw < target[token] / proposal[token]:
            continue
        rest = (target - proposal).clamp(min=0)
        rest = rest if rest.sum() > 0 else target                       # equal but for rounding
        return [*proposed[:i], int(torch.multinomial(rest, 1, generator=generator))]
    return [*proposed, int(torch.multinomial(p(len(proposed)), 1, generator=generator))]


class Lookup:
    """Proposes what followed the last three tokens, or two, when they stood in the text before."""

    def __init__(self):
        self.after, self.indexed = {}, 0     # some tokens -> the place after their last occurrence

    def propose(self, text: list[int], count: int, distribution, generator):
        """At most `count` tokens that may follow `text`; None: they are certain."""
        for place in range(self.indexed, len(text)):
            for length in (2, 3):
                if place >= length:
                    self.after[tuple(text[place - length:place])] = place
        self.indexed = len(text)
        for length in (3, 2):
            place = self.after.get(tuple(text[-length:]))
            if place is not None:
                return text[place:place + count], None
        return [], None


class Draft:
    """Proposes what a smaller model draws; its cache follows the text."""

    def __init__(self, model: nn.Module):
        self.model, self.state, self.fed = model.eval(), model.new_state(1, 1), []

    def propose(self, text: list[int], count: int, distribution, generator):
        """At most `count` tokens that may follow `text`, and what each was drawn from."""
        context = self.model.config.context
        count = min(count, context + 1 - len(text))
        if count < 1:
            return [], []
        if self.state.capacity < len(text) + count - 1:
            self.state, self.fed = self.model.new_state(1, 2 * (len(text) + count)), []
        fed = len(self.fed)
        while self.fed != text[:-1][:len(self.fed)]:
            self.fed.pop()                   # what the model did not accept
        self.state.position.sub_(fed - len(self.fed))
        logits = self.model.read_prompts([text[len(self.fed):]], self.state)    # (1, V)
        proposed, q = [], []
        while True:
            q.append(distribution(logits))
            proposed.append(int(torch.multinomial(q[-1], 1, generator=generator)))
            if len(proposed) == count:
                self.fed = text + proposed[:-1]
                return proposed, q
            token = torch.tensor([proposed[-1:]], device=logits.device)
            logits = self.model(token, self.state, last=True)[:, 0]


class Speculation:
    """Generation in which one read of the model's weights checks several proposed tokens.

    Exact: greedy decoding gives the tokens of model.generate (but for ties closer than rounding),
    sampling has its distribution (not its draws). It needs a state that can forget the last tokens,
    a cache of keys and values: a recurrent model is a ValueError.

    probabilities: that function of the model's file. draft: a smaller model of the same vocabulary;
    None: proposals are what followed the same tokens earlier in the text.
    """
    LONGEST = 12                             # proposals at once; 4 at first
    PLAIN, CHECKED = 3, 8                    # steps without and with proposals, before it is judged

    def __init__(self, probabilities, draft: nn.Module | None = None):
        if draft is not None:
            refuse_recurrent(draft)
        self.probabilities, self.draft = probabilities, None if draft is None else Draft(draft)
        self.proposed = self.accepted = self.tokens = self.stops = 0
        self.seconds = 0.0
        self.plain, self.checked = deque(maxlen=32), deque(maxlen=32)   # the last steps, as
        # seconds, and as (seconds, tokens)

    @torch.no_grad()
    def generate(self, model: nn.Module, prompts: list[list[int]], max_new_tokens: int, *,
                 history=(), state=None, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, stop=None, seed: int | None = None,
                 on_token=None) -> list[list[int]]:
        """model.generate, for one prompt. history: the tokens that `state` has seen.

        Proposals end when they cost more time than they save; with a seed they do not, because
        time must not decide what is drawn.
        """
        c, (prompt, *more) = model.config, prompts
        refuse_recurrent(model)
        if more:
            raise ValueError(f"{len(prompts)} prompts: speculative decoding takes one")
        if self.draft and self.draft.model.config.vocab_size != c.vocab_size:
            raise ValueError(f"a draft model of {self.draft.model.config.vocab_size} tokens, but a "
                             f"model of {c.vocab_size}: their vocabulary must be the same")
        state = state or model.new_state(1, len(prompt) + max_new_tokens)
        past, sampling = int(state.position), (temperature, top_k, top_p)
        limit = min(max_new_tokens, c.context - past - len(prompt))
        if past + len(prompt) + limit - 1 > state.capacity:
            raise ValueError(f"{past + len(prompt) + limit - 1} tokens do not fit: the state was "
                             f"made for {state.capacity}")
        model.eval()
        # this checks all arguments and reads the prompt
        model.generate([prompt], 0, state=state, temperature=temperature, top_k=top_k, top_p=top_p)
        if stop is None:
            stop = c.eos_token_id if isinstance(c.eos_token_id, (list, tuple)) else [c.eos_token_id]
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        source, text, new = self.draft or Lookup(), [*history, *prompt], []
        longest, stopped = 4, False
        if limit > 0:
            state.position.sub_(1)           # from here on, the last token of `text` is not fed yet
        while len(new) < limit:
            count = min(longest, limit - len(new) - 1)
            if stopped or len(self.plain) < self.PLAIN:
                count = 0
            proposed, drawn = self.step(model, state, text, source, count, sampling, generator)
            if proposed:
                complete = len(drawn) > len(proposed)
                longest = min(longest + 2, self.LONGEST) if complete else max(1, len(drawn) - 1)
                if seed is None and self.is_slower():
                    stopped, self.stops = True, self.stops + 1
            for token in drawn:              # one by one: the state is right if on_token raises
                state.position.add_(1)
                text.append(token)
                if token not in stop:
                    new.append(token)
                if on_token is not None:
                    on_token(0, token)
                if token in stop:
                    return [new]
        return [new]

    def step(self, model, state, text, source, count, sampling, generator):
        """(proposed, drawn): up to `count` proposals, and the tokens that they become. The state
        holds their keys and values afterwards, but does not count them."""
        def distribution(logits):            # (1, V) -> (V,)
            return normalised(logits, self.probabilities, *sampling)
        start = time.perf_counter()
        proposed, q = [], []
        if count > 0:
            proposed, q = source.propose(text, count, distribution, generator)
        fed = torch.tensor([[text[-1], *proposed]], device=state.position.device)
        logits = model(fed, state)[0]                                   # (1 + proposals, V)
        drawn = accept(proposed, q, lambda i: distribution(logits[i:i + 1]), generator)
        state.position.sub_(fed.shape[1])
        seconds = time.perf_counter() - start
        if proposed:
            self.checked.append((seconds, len(drawn)))
        else:
            self.plain.append(seconds)
        self.proposed, self.accepted = self.proposed + len(proposed), self.accepted + len(drawn) - 1
        self.tokens, self.seconds = self.tokens + len(drawn), self.seconds + seconds
        return proposed, drawn

    def is_slower(self) -> bool:
        """Whether the last checked steps took more time per token than plain steps."""
        seconds, tokens = map(sum, zip(*self.checked))
        plain = statistics.median(self.plain)
        return len(self.checked) >= self.CHECKED and seconds / tokens > plain

    def report(self) -> str:
        """One line: what was accepted, and the speed against plain steps."""
        if not self.proposed:
            return "speculation: nothing was proposed"
        gain = statistics.median(self.plain) * self.tokens / self.seconds
        stops = f"; turned off {self.stops} times, being slower" if self.stops else ""
        return (f"speculation: {self.accepted} of {self.proposed} proposed tokens accepted "
                f"({self.accepted / self.proposed:.0%}), {gain:.2f} x the speed without{stops}")


def normalised(logits: Tensor, probabilities, temperature, top_k, top_p) -> Tensor:
    """(1, V) logits -> (V,) what is drawn from, fp64 on the CPU; temperature 0: one token alone."""
    if not logits.amax().isfinite():
        raise ValueError("the logits hold NaN or infinity: damaged weights, or too narrow a dtype")
    if temperature == 0:
        return F.one_hot(logits[0].argmax().cpu(), logits.shape[-1]).double()
    probs = probabilities(logits.float().cpu(), temperature, top_k, top_p)[0].double()
    return probs / probs.sum()


def refuse_recurrent(model: nn.Module) -> None:
    """ValueError if the model's state cannot forget the last tokens."""
    if not {"key", "value"} <= {*model.new_state(1, 1)._fields}:
        raise ValueError(f"{type(model).__name__} is recurrent: its state cannot take back tokens "
                         "that are not accepted, so it has no speculative decoding")
