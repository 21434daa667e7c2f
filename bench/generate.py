"""Generation, side by side with what a user would pick instead, in interleaved runs.

    python bench/generate.py | tee bench/generate.log
    python bench/generate.py gpt2 rwkv6-prompt --repeats 9      # some of the cases
    python bench/generate.py --quality out/gpt                  # what int8 and int4 cost in quality

Both sides load the same saved folder of random weights and run in one process, at one dtype and one
number of threads, warmed up; then they take turns, and medians of --repeats turns are compared,
and the best turns, which other work on the machine disturbs less.
Decoding is the time from token to token in each side's own `generate`, from a cache that is filled
once; prompts count until the first token. transformers runs with the fastest of sdpa or eager
attention and a dynamic or static cache, by a trial for each model and dtype. A side that needs more
than half a minute for one turn is measured once, and that is said.
"""
import argparse
import copy
import datetime
import functools
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", RWKV_JIT_ON="1", RWKV_CUDA_ON="0", RWKV_V7_ON="0",
                  TRANSFORMERS_VERBOSITY="error")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch                                                            # noqa: E402
from torch.nn import functional as F                                    # noqa: E402

import gpt                                                              # noqa: E402
import llama3                                                           # noqa: E402
import rwkv6                                                            # noqa: E402
from practice import fast                                               # noqa: E402

NEW = 16                                     # tokens of a decoding run
SLOW = 30                                    # seconds
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = {"fp32": ("fp32",), "fp32, --fast off": ("fp32", None, "off"), "bf16": ("bf16",),
         "int8": ("bf16", "int8"), "int4": ("bf16", "int4")}            # arguments of Ours
MODELS = {
    "gpt2": (gpt.GPT, gpt.SIZES["gpt2"]),
    "llama": (llama3.Llama3, llama3.Llama3Config(
        max_position_embeddings=8192, hidden_size=768, num_hidden_layers=12, head_dim=64,
        num_attention_heads=12, num_key_value_heads=4, intermediate_size=2048, vocab_size=32000)),
    "rwkv6": (rwkv6.RWKV6, rwkv6.RWKV6Config.sized(12, 768, 65536, 1024))}
TITLES = {"gpt2": "GPT-2 124M", "llama": "Llama 125M", "rwkv6": "RWKV-6 197M"}
LEAST = {                                    # the factors to reach
    "gpt2": {"fp32": 1.5, "bf16": 1.3, "int8": 2.4}, "llama": {"fp32": 1.5, "bf16": 1.25},
    "rwkv6": {"fp32": 1.6, "bf16": 1.2}, "gpt2-prompt": {"fp32": 1.5, "bf16": 1.2},
    "llama-prompt": {"fp32": 1.5, "bf16": 1.2}, "rwkv6-prompt": {"fp32": 1.5, "bf16": 1.5},
    "products": {"fp32": 0.82, "bf16": 0.75, "int8": 0.65, "int4": 0.5}}


class Case(NamedTuple):
    """What is measured together, and the lines of its table."""
    title: str
    sides: dict                              # name -> function that returns seconds
    lines: list[tuple]                       # (label, name, name to compare with, least factor)
    tokens: int = 1                          # of the seconds: the table has tokens / seconds
    after: object = None                     # called at the end: a line to print


def some_tokens(count, vocabulary, seed=0):
    """Random tokens: weights are random too, and no speed here depends on either."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

# ------------------------------------------------------------------------------------------- sides
# read(prompt) -> seconds to the first token; it fills a cache
# decode(n) -> (seconds from token to token, the n tokens that come next), from a copy of the cache


def in_memory(model):
    """The model with copies of its weights: pages of a file may be dropped meanwhile."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def between(times):
    """Seconds from token to token, on average."""
    return (times[-1] - times[0]) / (len(times) - 1)


class Ours:
    """This project's model, as chat.py runs it."""

    def __init__(self, folder, model_class, dtype, weights=None, mode="auto"):
        self.model = in_memory(model_class.from_pretrained(folder, dtype=DTYPES[dtype]))
        self.about = fast.accelerate(self.model, weights, mode)

    def read(self, prompt, slots=None):
        start = time.perf_counter()
        self.state = self.model.new_state(1, slots or len(prompt) + NEW + 1)
        [[self.last]] = self.model.generate([prompt], 1, state=self.state, temperature=0, stop=())
        return time.perf_counter() - start

    def decode(self, new):
        times, state = [], self.state._make(map(torch.clone, self.state))
        [tokens] = self.model.generate([[self.last]], new, state=state, temperature=0, stop=(),
                                       on_token=lambda *_: times.append(time.perf_counter()))
        return between(times), tokens


class Transformers:
    """transformers, with what is fastest of its attentions and caches."""

    def __init__(self, folder, dtype):
        from transformers import AutoModelForCausalLM
        self.times = []
        self.model = in_memory(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]))
        self.model.eval()

        def trial(variant):
            self.variant = variant
            self.read([*range(3, 11)])
            return min(self.decode(5)[0] for _ in range(3))
        self.variant = min(itertools.product(("sdpa", "eager"), ("dynamic", "static")), key=trial)
        self.model.set_attn_implementation(self.variant[0])
        self.about = "transformers with {} attention and a {} cache".format(*self.variant)

    @torch.no_grad()
    def read(self, prompt):
        from transformers import DynamicCache, StaticCache
        attention, cache = self.variant
        self.model.set_attn_implementation(attention)
        start, c = time.perf_counter(), self.model.config
        self.cache = (StaticCache(config=c, max_cache_len=len(prompt) + NEW + 1)
                      if cache == "static" else DynamicCache(config=c))
        logits = self.model(torch.tensor([prompt]), past_key_values=self.cache, logits_to_keep=1)
        self.tokens = torch.tensor([[*prompt, logits.logits[0, -1].argmax().item()]])
        return time.perf_counter() - start

    def put(self, tokens):
        """It is its own streamer: notes when each token came; first of all comes the prompt."""
        self.times.append(time.perf_counter())

    def end(self):
        pass

    def decode(self, new):
        cache, self.times = copy.deepcopy(self.cache), []
        out = self.model.generate(self.tokens, attention_mask=torch.ones_like(self.tokens),
                                  max_new_tokens=new, do_sample=False, eos_token_id=None,
                                  pad_token_id=0, past_key_values=cache, streamer=self)
        return between(self.times[1:]), out[0, self.tokens.shape[1]:].tolist()


class Package:
    """The rwkv package, called token by token as its own examples do."""
    about = "the rwkv package"

    def __init__(self, folder, dtype):
        from rwkv.model import RWKV
        self.model = RWKV(str(folder / "model"), f"cpu {dtype}", verbose=False)

    @torch.no_grad()
    def read(self, prompt):
        start = time.perf_counter()
        logits, self.state = self.model.forward(prompt, None)
        self.last = int(logits.argmax())
        return time.perf_counter() - start

    @torch.no_grad()
    def decode(self, new):
        times, tokens, state = [], [], copy.deepcopy(self.state)
        for _ in range(new):
            logits, state = self.model.forward([self.last, *tokens][-1:], state)
            tokens.append(int(logits.argmax()))
            times.append(time.perf_counter())
        return between(times), tokens


class LlamaCpp:
    """llama.cpp through llama-cpp-python, on a GGUF file of the same weights."""

    def __init__(self, folder, model, kind):
        import gguf
        import llama_cpp as cpp
        self.cpp, self.vocabulary, self.about = cpp, model.config.vocab_size, f"llama.cpp {kind}"
        self.quiet = cpp.llama_log_callback(lambda *_: None)            # must outlive its use
        cpp.llama_log_set(self.quiet, None)
        path = str(folder / f"{kind}.gguf")
        self.write(gguf, path, model, kind)
        self.weights = cpp.llama_model_load_from_file(
            path.encode(), cpp.llama_model_default_params())
        settings = cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = cpp.llama_init_from_model(self.weights, settings)

    @staticmethod
    def write(gguf, path, model, kind):
        c, writer = model.config, gguf.GGUFWriter(path, "llama")
        for name, value in dict(
                context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                block_count=c.num_hidden_layers, feed_forward_length=c.intermediate_size,
                head_count=c.num_attention_heads, head_count_kv=c.num_key_value_heads,
                layer_norm_rms_eps=c.rms_norm_eps, rope_freq_base=c.rope_theta,
                rope_dimension_count=c.head_dim, vocab_size=c.vocab_size).items():
            getattr(writer, f"add_{name}")(value)
        writer.add_tokenizer_model("no_vocab")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):       # rotates neighbours
                tensor = tensor.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
            array, raw = tensor.float().numpy(), None
            if tensor.dim() > 1 and kind != "F32":
                raw = gguf.GGMLQuantizationType[kind]
                array = gguf.quants.quantize(array, raw)
            writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def feed(self, tokens):
        import numpy
        array = (self.cpp.llama_token * len(tokens))(*tokens)
        batch = self.cpp.llama_batch_get_one(array, len(tokens))
        if self.cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self.cpp.llama_get_logits_ith(self.context, -1)
        return int(numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def read(self, prompt):
        start = time.perf_counter()
        self.memory, self.length = self.cpp.llama_get_memory(self.context), len(prompt)
        self.cpp.llama_memory_clear(self.memory, True)
        self.last = self.feed(prompt)
        return time.perf_counter() - start

    def decode(self, new):
        times, tokens = [], []
        self.cpp.llama_memory_seq_rm(self.memory, 0, self.length, -1)
        for _ in range(new):
            tokens.append(self.feed([self.last, *tokens][-1:]))
            times.append(time.perf_counter())
        return between(times), tokens

# ------------------------------------------------------------------------------------------- cases


def save(name, folder):
    """The folder of random weights that both sides load; returns the model."""
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    if name != "rwkv6":
        model = model_class(config)
    else:                                    # its own start is slow to draw, and has dead paths
        with torch.device("meta"):
            model = model_class(config)
        model = model.to_empty(device="cpu")
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(std=0.02)
                if key.endswith("time_decay"):                          # decays of trained models
                    parameter.uniform_(-6.0, -1.0)
                elif ".ln" in key and key.endswith("weight"):
                    parameter.fill_(1.0)
    model.save_pretrained(folder)
    return model


def load(name, folder, kinds=KINDS):
    """Both sides of a model: {"fp32": …, "their fp32": …}, said as they are loaded."""
    model, other = save(name, folder), Package if name == "rwkv6" else Transformers
    ours, makers = MODELS[name][0], {}
    for kind in kinds:
        makers[kind] = functools.partial(Ours, folder, ours, *KINDS[kind])
        makers[f"their {KINDS[kind][0]}"] = functools.partial(other, folder, KINDS[kind][0])
    if name == "llama" and kinds is KINDS:
        for kind, code in {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}.items():
            makers[f"llama.cpp {kind}"] = functools.partial(LlamaCpp, folder, model, code)
    sides = {}
    for side, make in makers.items():
        try:
            sides[side] = make()
            print(f"  {side}: {sides[side].about}", flush=True)
        except ImportError as error:
            print(f"  {side}: left out, {error}", flush=True)
    return sides


def lines(sides, least):
    """Each kind of ours against the same dtype of others, int8 and int4 against bf16."""
    pairs = [(kind, kind, f"their {KINDS[kind][0]}", least.get(kind)) for kind in KINDS]
    pairs += [(f"{kind}, llama.cpp", kind, f"llama.cpp {kind}", 0.9) for kind in KINDS]
    return [pair for pair in pairs if pair[1] in sides and pair[2] in sides]


def agreement(sides):
    """How far the greedy tokens of both sides agree in fp32."""
    ours, theirs = (sides[name].decode(NEW)[1] for name in ("fp32", "their fp32"))
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), NEW)
    return f"Greedy tokens in fp32: the first {same} of {NEW} are the same."


def decode(name, folder):
    """Decoding after 64 tokens; for GPT-2 also the products of a token alone."""
    sides, vocabulary = load(name, folder), MODELS[name][1].vocab_size
    for side in sides.values():
        side.read(some_tokens(64, vocabulary))
    timed = {name: lambda side=side: side.decode(NEW)[0] for name, side in sides.items()}
    table = lines(sides, LEAST[name])
    if name == "gpt2":
        for kind, least in LEAST["products"].items():
            timed[f"products {kind}"] = functools.partial(products, layers(sides[kind].model))
            table.append((f"{kind}: time of the products over the time of a token", kind,
                          f"products {kind}", least))
    return Case(f"{TITLES[name]}, decoding: tokens/s", timed, table,
                after=lambda: agreement(sides))


def layers(model):
    return [m for m in model.modules() if isinstance(m, (torch.nn.Linear, fast.Replacement))]


@torch.no_grad()
def products(layers):
    """Seconds for these linear layers alone, one token each."""
    widths = [getattr(layer, "in_features", None) or layer.shape[1] for layer in layers]
    weight = getattr(layers[0], "weight", None)
    plain = weight is not None and weight.is_floating_point()
    inputs = [torch.ones(1, 1, width, dtype=weight.dtype if plain else torch.bfloat16)
              for width in widths]
    start = time.perf_counter()
    for layer, x in zip(layers, inputs):
        layer(x)
    return time.perf_counter() - start


def floor(folder):
    """GPT-2's linear layers alone, by each of torch's products, against reading their bytes."""
    model, sides, table = gpt.GPT(gpt.SIZES["gpt2"]), {}, []
    for label, dtype, weights, bits in (("fp32", torch.float32, None, 32),
                                        ("bf16", torch.bfloat16, None, 16),
                                        ("int8", torch.bfloat16, "int8", 8),
                                        ("int4", torch.bfloat16, "int4", 5)):
        linears = layers(model.to(dtype))
        numbers = torch.ones(sum(layer.weight.numel() for layer in linears) * bits // 32)
        sides[f"reading {label}"] = functools.partial(reading, numbers)
        for name, kind in {"F.linear": copy.deepcopy, **fast.KINDS[weights]}.items():
            if weights and name == "F.linear" or label == "fp32" and kind is fast.Half:
                continue                     # there is none, or it rounds
            try:
                made = [kind(layer) for layer in linears]
                products(made)
            except (RuntimeError, AttributeError):
                continue                     # not on this machine
            sides[f"{label} {name}"] = functools.partial(products, made)
            table.append((f"{label}, {name}", f"{label} {name}", f"reading {label}", None))
    return Case("GPT-2's linear layers alone against reading their bytes: tokens/s", sides, table)


def reading(numbers):
    """Seconds to read a tensor."""
    start = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - start


def prompts(name, folder):
    """Prompts of 512 tokens."""
    sides, prompt = load(name, folder), some_tokens(512, MODELS[name][1].vocab_size)
    timed = {name: lambda side=side: side.read(prompt) for name, side in sides.items()}
    return Case(f"{TITLES[name]}, a prompt of 512: tokens/s", timed,
                lines(sides, LEAST[f"{name}-prompt"]), 512)


def long(dtype, folder):
    """Decoding at context 4,000, and what unused slots of the cache cost."""
    sides = load("llama", folder, [dtype])
    for side in sides.values():
        side.read(some_tokens(4000, 32000))
    ours, roomy = sides[dtype], copy.copy(sides[dtype])
    roomy.state = roomy.model.new_state(1, 8192)
    for whole, part in zip(roomy.state, ours.state):
        whole[tuple(map(slice, part.shape))] = part
    sides["8,192 slots"] = roomy
    return Case(f"Llama 125M in {dtype}, decoding at context 4,000: tokens/s",
                {name: lambda side=side: side.decode(NEW)[0] for name, side in sides.items()},
                [(dtype, dtype, f"their {dtype}", 1.2 if dtype == "fp32" else 2.5),
                 (f"8,192 slots against {ours.state.capacity:,}", "8,192 slots", dtype, 1.0)])


def batch(dtype, folder):
    """16 prompts of 16 to 256 tokens, 16 new tokens each; the other side pads them."""
    sides, texts = load("llama", folder, [dtype]), {}
    lengths = torch.linspace(16, 256, 16).long().tolist()
    rows = [some_tokens(length, 32000, seed) for seed, length in enumerate(lengths)]
    padded = torch.tensor([[0] * (256 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (256 - len(row)) + [1] * len(row) for row in rows])

    def ours():
        start = time.perf_counter()
        texts["ours"] = sides[dtype].model.generate(rows, NEW, temperature=0, stop=())
        return time.perf_counter() - start

    def theirs():
        start = time.perf_counter()
        out = sides[f"their {dtype}"].model.generate(
            padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
            pad_token_id=0)
        texts["theirs"] = out[:, 256:].tolist()
        return time.perf_counter() - start

    def same():
        count = sum(a == b for a, b in zip(texts["ours"], texts["theirs"]))
        return f"{count} of 16 continuations are the same."
    return Case(f"Llama 125M in {dtype}, 16 prompts of 16 to 256, 16 new each: tokens/s",
                {"ours": ours, "theirs": theirs}, [(dtype, "ours", "theirs", 1.5)], 16 * NEW, same)


MINIMAL = """import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=1, do_sample=False)[0]))
"""


def start(folder):
    """From the command line to the first token, with a checkpoint of 500 MB."""
    import tokenizer as text
    save("gpt2", folder)
    text.train_bpe([(ROOT / "tokenizer.py").read_text(encoding="utf-8")], 1000).save(folder)
    ask = "def forward(self, x):"
    ours = ["chat.py", folder, "--prompt", ask, "--max-new-tokens", "1", "--temperature", "0"]

    def run(arguments):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start
    return Case("Command line to first token, a checkpoint of 500 MB: runs per second",
                {"ours": lambda: run(ours), "theirs": lambda: run(["-c", MINIMAL, folder, ask])},
                [("chat.py --prompt against a minimal transformers script", "ours", "theirs", 1.0)])


CASES = {"floor": floor} | {name: functools.partial(decode, name) for name in MODELS}
CASES |= {f"{name}-prompt": functools.partial(prompts, name) for name in MODELS}
CASES |= {f"{case.__name__}-{dtype}": functools.partial(case, dtype)
          for case in (long, batch) for dtype in DTYPES} | {"start": start}

# --------------------------------------------------------------------------------------- measuring


def in_turns(functions, repeats):
    """{name: `repeats` values} of functions that take turns, each called once before.

    Where that first call takes more than SLOW seconds, its value is all that is measured.
    """
    values = {}
    for name, function in functions.items():
        begin = time.perf_counter()
        value = function()
        values[name] = [value] if time.perf_counter() - begin > SLOW else []
    slow = [name for name, found in values.items() if found]
    for _ in range(repeats):
        for name, function in functions.items():
            if name not in slow:
                values[name].append(function())
    if slow:
        print(f"  measured once, taking more than {SLOW} s: {', '.join(slow)}", flush=True)
    return values


def table(title, columns, rows):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(flush=True)


def report(case, repeats):
    """Measure a case and print its table."""
    values = in_turns(case.sides, repeats)
    seconds = {name: statistics.median(found) for name, found in values.items()}
    best = {name: min(found) for name, found in values.items()}
    table(case.title, ["", "ours", "theirs", "factor", "of the best turns", "at least"],
          [(label, f"{case.tokens / seconds[ours]:.3g}", f"{case.tokens / seconds[theirs]:.3g}",
            f"{seconds[theirs] / seconds[ours]:.2f}", f"{best[theirs] / best[ours]:.2f}",
            least or "") for label, ours, theirs, least in case.lines])
    if case.after:
        print(case.after(), flush=True)


@torch.no_grad()
def quality(args):
    """Perplexity on held-out text, and the distance from what the stored weights predict."""
    import tokenizer as text
    from checkpoints import load_checkpoint
    tokenizer = text.load_tokenizer(args.quality)
    files = args.text or sorted([*ROOT.glob("*.py"), *ROOT.glob("lineage/*.py")])
    tokens = [token for file in files
              for token in tokenizer.encode(file.read_text(encoding="utf-8"))]
    model, rows = load_checkpoint(args.quality), []
    blocks = [block for block in torch.tensor(tokens[:args.tokens]).split(
        min(model.config.context or 512, 512)) if len(block) > 1]
    count = sum(len(block) - 1 for block in blocks)
    for weights in ("int8", "int4"):
        other = load_checkpoint(args.quality)
        fast.accelerate(other, weights)
        base = loss = divergence = same = 0.0
        for block in blocks:
            p, q = (m(block[None])[0, :-1].float().log_softmax(-1) for m in (model, other))
            base += F.nll_loss(p, block[1:], reduction="sum").item()
            loss += F.nll_loss(q, block[1:], reduction="sum").item()
            divergence += F.kl_div(q, p, log_target=True, reduction="sum").item()
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        stored, found = (torch.tensor(total / count).exp().item() for total in (base, loss))
        rows.append((weights, f"{found:.3f}", f"{found / stored - 1:+.2%}",
                     f"{divergence / count:.5f}", f"{same / count:.1%}"))
    table(f"Quality of {args.quality}: {count:,} tokens of {files[0].name} to {files[-1].name}",
          ["weights", "perplexity", "change", "KL, nats/token", "the same most likely token"],
          [("as stored", f"{stored:.3f}", "", "", ""), *rows])


def header() -> str:
    """Command, date, machine, and the versions of what is compared."""
    from importlib.metadata import PackageNotFoundError, version
    told = []
    for package in ("torch", "transformers", "rwkv", "llama-cpp-python"):
        try:
            told.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            told.append(f"no {package}")
    return (f"python bench/generate.py {' '.join(sys.argv[1:])}\n{datetime.date.today()}, "
            f"{os.cpu_count()} cores ({fast.processor()}), {torch.get_num_threads()} threads; "
            f"{platform.system()}, Python {platform.python_version()}, {', '.join(told)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (all)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of every side (7)")
    parser.add_argument("--threads", type=int, help="of both sides (as torch chooses)")
    parser.add_argument("--quality", type=Path, metavar="DIR", help="a trained checkpoint")
    parser.add_argument("--text", type=Path, nargs="*", metavar="FILE", help="text of --quality")
    parser.add_argument("--tokens", type=int, default=16384, help="of that text (16384)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if unknown := {*args.cases} - {*CASES}:
        parser.error(f"{', '.join(unknown)}: the cases are {', '.join(CASES)}")
    print(header(), flush=True)
    if args.quality:
        quality(args)
        return
    for name in args.cases or CASES:
        with tempfile.TemporaryDirectory() as folder:
            report(CASES[name](Path(folder)), args.repeats)


if __name__ == "__main__":
    main()
