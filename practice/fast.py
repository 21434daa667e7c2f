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
import json
import os
import platform
import re
import statistics
import time
from collections import deque
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ----------------------------------------------------------------------------------- linear layers
# N outputs   K inputs   G group size of int4   n rows of the weight, some of N

ROWS = 1, 8, 64         # operators are measured on a new token, a small batch and a prompt,
LIMITS = 3, 24          # and used for up to 3 rows, up to 24, and more


class Replacement(nn.Module):
    """x Wᵀ + b, as the nn.Linear that it replaces. operators: one for each of ROWS, by name:

        plain     F.linear. It is what runs whenever gradients are recorded
        special   an operator of torch for this kind of weight, see there
        packed    FBGEMM's product, on weights in fp16 in a layout of its own
        fp32      block by block in fp32; like packed, for CPUs that are slow in 16 bits
    """
    STORES = (("plain", "special", "fp32"),)    # which operators can share one storage

    def __init__(self, linear: nn.Linear, operators: tuple[str, str, str]):
        super().__init__()
        self.operators, self.shape, self.bias = operators, linear.weight.shape, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 1:
            return self(x[None])[0]
        count = x.numel() // self.shape[1]
        operator = self.operators[sum(count > limit for limit in LIMITS)]
        return getattr(self, "plain" if torch.is_grad_enabled() else operator)(x)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of W in fp32."""
        raise NotImplementedError

    def plain(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rows(0, self.shape[0]).to(x.dtype), self.bias)

    def fp32(self, x: Tensor) -> Tensor:
        step, x32 = max(1, 2 ** 18 // self.shape[1]), x.float()         # blocks that fit a cache
        blocks = [product(x32, self.rows(i, i + step)) for i in range(0, self.shape[0], step)]
        y = torch.cat(blocks, -1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by oneDNN, where torch has it: in fp32 the quickest on many processors."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(Replacement):
    """The same weights; `special` is oneDNN's product."""
    STORES = (*Replacement.STORES, ("packed",))
    SPECIAL = "oneDNN"

    def __init__(self, linear: nn.Linear, operators):
        super().__init__(linear, operators)
        self.weight = linear.weight
        if "packed" in operators:
            # exact but for what bf16 has below 2 ** -17; fp16 has nothing above 65504: then plain
            weight = self.weight.detach().float()
            if all((part.half() - part).norm() <= 2 ** -16 * part.norm()
                   for part in weight.split(1024)):
                bias = None if self.bias is None else self.bias.detach().float()
                self.packs = torch.ops.quantized.linear_prepack_fp16(weight, bias)
                del self.weight
            else:
                self.operators = ("plain",) * len(ROWS)

    def rows(self, start: int, stop: int) -> Tensor:
        if "packed" in self.operators:
            return torch.ops.quantized.linear_unpack_fp16(self.packs)[0][start:stop].float()
        return self.weight[start:stop].float()

    def plain(self, x: Tensor) -> Tensor:
        if "packed" in self.operators:
            return super().plain(x)
        return F.linear(x, self.weight, self.bias)

    def special(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:     # under autocast
            return self.plain(x)
        return product(x, self.weight, self.bias)

    def packed(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packs).to(x.dtype)


class Quantised(Replacement):
    """Fewer bits per weight; torch's operators read them with activations in bf16."""
    SPECIAL = "torch's"

    def __init__(self, linear: nn.Linear, operators):
        super().__init__(linear, operators)
        step = max(64, 2 ** 18 // self.shape[1] // 64 * 64)             # rows, to bound memory
        with torch.no_grad():
            parts = [self.quantise(rows.float()) for rows in linear.weight.split(step)]
        weight, scale = zip(*parts)
        self.register_buffer("weight", torch.cat(weight), persistent=False)
        self.register_buffer("scale", torch.cat(scale, self.SCALE_AXIS), persistent=False)

    def special(self, x: Tensor) -> Tensor:
        # each further call of torch costs tens of µs for a new token, so there are few
        rows = x.reshape(-1, self.shape[1]).bfloat16().contiguous()
        if self.padding:
            rows = F.pad(rows, (0, self.padding))
        elif torch.compiler.is_compiling() or rows.data_ptr() % 32:     # int8 crashes there
            rows = rows.clone()
        y = self.product(rows).to(x.dtype).view(*x.shape[:-1], self.shape[0])
        return y if self.bias is None else y + self.bias


class Int8(Quantised):
    """W = weight * scale: 8 bits per weight, and a scale for each row."""
    SCALE_AXIS = 0

    def quantise(self, w: Tensor):
        """(n, K) fp32 -> weight (n, K) int8, scale (n,) bf16. A scale is rounded before it is used.

        K is padded with zeros to whole vectors of the operator.
        """
        self.padding = -w.shape[1] % 32
        scale = (w.abs().amax(1) / 127).clamp(min=1e-30).bfloat16()
        weight = (w / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        return F.pad(weight, (0, self.padding)), scale

    def rows(self, start: int, stop: int) -> Tensor:
        weight = self.weight[start:stop, :self.shape[1]].float()
        return weight * self.scale[start:stop, None].float()

    def product(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)


class Int4(Quantised):
    """W = weight * scale + zero with weight in -8 ... 7, scale and zero for each G inputs of a row.

    4 bits per weight, and 32 bits for a scale and a zero: 5 bits in all with G = 32.
    """
    STORES = (("special",), ("plain", "fp32"))
    GROUP = 32                               # torch's operator also has 64, 128 and 256

    def __init__(self, linear: nn.Linear, operators):
        self.SCALE_AXIS = int("special" in operators)                   # see quantise
        super().__init__(linear, operators)

    def quantise(self, w: Tensor):
        """(n, K) fp32 -> weight (n, K / 2) uint8, two in a byte, and scale (n, K / G, 2) bf16.

        torch's operator has a layout of its own, n in multiples of 64, and scale (K / G, n, 2).
        """
        special = "special" in self.operators
        self.padding = -w.shape[1] % self.GROUP
        w = F.pad(w, (0, self.padding, 0, -len(w) % 64 if special else 0))
        w = w.unflatten(1, (-1, self.GROUP))                            # (n, K / G, G)
        low, high = w.aminmax(dim=-1, keepdim=True)                     # (n, K / G, 1)
        scale = ((high - low) / 15).clamp(min=1e-30).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        weight = ((w - zero.float()) / scale.float()).round_().clamp_(-8, 7).add_(8).flatten(1)
        scale = torch.cat([scale, zero], -1)                            # (n, K / G, 2)
        if special:
            pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            return pack(weight.int(), 1), scale.transpose(0, 1)
        weight = weight.to(torch.uint8)
        return weight[:, ::2] | weight[:, 1::2] << 4, scale

    def rows(self, start: int, stop: int) -> Tensor:
        K = self.shape[1]
        if "special" in self.operators:      # in torch's layout: multiply by the identity
            eye = torch.eye(K, K + self.padding, dtype=torch.bfloat16)
            return self.product(eye)[:, start:stop].t().float()
        bytes = self.weight[start:stop]                                 # (n, K / 2)
        weight = torch.stack([bytes & 15, bytes >> 4], -1).flatten(1).unflatten(1, (-1, self.GROUP))
        scale, zero = self.scale[start:stop].float().split(1, -1)       # (n, K / G, 1)
        return ((weight.float() - 8) * scale + zero).flatten(1)[:, :K]

    def product(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.GROUP, self.scale)
        return y[:, :self.shape[0]]          # without the padding


KINDS = {None: Linear, "int8": Int8, "int4": Int4}


def accelerate(model: nn.Module, weights: str | None = None, fast: str = "auto") -> str:
    """Replace every nn.Linear of a model, for generation; returns a line that says by what and why.

    weights: "int8" or "int4", or None: as they are. fast: "auto" takes the operators that are
    quickest on this machine, measured once; "off" plain ones. A tied head is replaced like any
    other layer, and the embedding table stays as it is. Not for a model to be saved or trained.
    """
    kind = KINDS[weights]
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    device, dtype = linears[0].weight.device.type, linears[0].weight.dtype
    operators, why = ("plain",) * len(ROWS), "--fast off"
    if fast != "off" and device != "cpu":
        why = f"other operators are for CPUs, this is {device}"
    elif fast != "off":
        operators, why = choose(kind, timings(linears, weights))
    if weights or set(operators) != {"plain"}:
        for parent in [*model.modules()]:
            for name, child in [*parent.named_children()]:
                if type(child) is nn.Linear:
                    setattr(parent, name, kind(child, operators))
    return f"{weights or str(dtype).removeprefix('torch.')} weights, {why}"


def choose(kind: type, times: dict[str, list[float]]) -> tuple[tuple[str, ...], str]:
    """(operators, why): of the operators that share a storage, the quickest for each of ROWS."""
    best, chosen = float("inf"), None
    for store in kind.STORES:
        here = [name for name in store if name in times]
        if here:                             # a gain of less than 5 % is noise: then plain
            names = [min(here, key=lambda name: times[name][i] * (0.95 if name == "plain" else 1))
                     for i in range(len(ROWS))]
            total = sum(times[name][i] / ROWS[i] for i, name in enumerate(names))
            if total < 0.95 * best:
                best, chosen = total, tuple(names)
    token, batch, prompt = (times["replaced"][i] / times[name][i] for i, name in enumerate(chosen))
    labels = dict.fromkeys(kind.SPECIAL if name == "special" else name for name in chosen)
    slower = "; SLOWER than without" if token < 0.9 else ""
    return chosen, (f"{' / '.join(labels)} products: {token:.2f} x the speed of plain ones for a "
                    f"new token, {batch:.2f} x in small batches, {prompt:.2f} x in prompts, as "
                    f"measured here{slower}")


def timings(linears: list[nn.Linear], weights: str | None) -> dict[str, list[float]]:
    """{operator: [seconds for 1, 8, 64 rows]} through layers like these; "replaced": the layers.

    Measured once for a processor, a torch and a set of shapes, and kept in the user's cache folder.
    An operator that is missing here, or refuses this dtype, is left out.
    """
    some = first(linears, 2 ** 25)           # more than the processor's cache holds
    some.append(part(linears[-1], 2 ** 24))  # of the head, which is larger than the others
    dtype = some[0].weight.dtype
    names = {name for store in KINDS[weights].STORES for name in store}
    if weights is None and dtype == torch.float32:
        names -= {"fp32", "packed"}
    shapes = sorted({"x".join(map(str, layer.weight.shape)) for layer in some})
    key = (f"torch {torch.__version__}, {processor()}, {torch.get_num_threads()} threads, "
           f"{dtype}, {weights}, {' '.join(sorted(names))}, {' '.join(shapes)}")
    return remembered(key, lambda: measure(some, KINDS[weights], sorted(names)))


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
def measure(linears: list[nn.Linear], kind: type, names: list[str]) -> dict[str, list[float]]:
    """The best of some passes of each operator that gives the right result, in turns."""
    layers = {"replaced": linears}
    inputs = [[torch.randn(rows, linear.in_features).to(linear.weight.dtype)
               for linear in (linears if rows == 1 else first(linears, 2 ** 22))] for rows in ROWS]
    right = [F.linear(x, linears[0].weight, linears[0].bias).float() for x, *_ in inputs]
    for name in names:                       # a trial call for each number of rows
        try:
            made = [kind(linear, (name,) * len(ROWS)) for linear in linears]
            for (x, *_), expected in zip(inputs, right):
                error = (made[0](x).float() - expected).norm() / expected.norm()
                if not error < 0.3:          # int4 of random weights has 0.1; NaN is no number
                    raise RuntimeError(f"{name}: relative error {error}")
            layers[name] = made
        except (RuntimeError, AttributeError):
            continue
    times = {name: [float("inf")] * len(ROWS) for name in layers}
    for i in range(len(ROWS)):
        for turn in range(15):
            for name, made in layers.items():
                if turn > 4 and times[name][i] > 3 * min(found[i] for found in times.values()):
                    continue                 # it will not win
                start = time.perf_counter()
                for layer, x in zip(made, inputs[i]):
                    layer(x)
                times[name][i] = min(times[name][i], time.perf_counter() - start)
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
        return isinstance(times, dict) and {"replaced", "plain"} <= {*times} and all(
            isinstance(found, list) and len(found) == len(ROWS)
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
