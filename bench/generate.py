"""Generation, side by side with what a user would pick instead, in one interleaved run.

    python bench/generate.py | tee bench/generate.log
    python bench/generate.py --rows gpt,rwkv --repeats 9        # some of the tables
    python bench/generate.py --quality out/gpt                  # what int8 and int4 cost in quality

Both sides load the same saved folder of random weights and run in one process at one dtype and one
number of threads, warmed up; then they take turns, each begun with a short run that is not timed, and
medians of --repeats are compared. A time per token is what lies between the tokens that the side's
own `generate` reports; prompts count from the call to the first token. transformers runs with the faster of sdpa and eager attention and of a
dynamic and a static cache, as measured here. llama.cpp, where --llama-python names a Python that
has llama-cpp-python and gguf, runs in a process beside this one and waits while others are timed.
A side that needs more than a minute for one run is measured once, and that is said.
"""
import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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

NEW = 32                                                                # tokens of a decoding run
SLOW = 60
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA = llama3.Llama3Config(max_position_embeddings=8192, hidden_size=768, num_hidden_layers=12,
                            num_attention_heads=12, num_key_value_heads=4, head_dim=64,
                            intermediate_size=2048, vocab_size=32000)


def some_tokens(count, vocabulary, seed=0):
    """Random tokens: weights are random too, and no speed here depends on either."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

# ------------------------------------------------------------------------------------------- sides
# A side is a function (prompt, number of new tokens) -> (seconds of each token from the start of the
# call, tokens), greedy.


def in_memory(model):
    """The model with copies of its weights: pages of a file may be dropped while others are timed."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def ours(folder, model_class, dtype, weights=None, plain=False):
    """This project's model, as chat.py runs it."""
    model = in_memory(model_class.from_pretrained(folder, dtype=DTYPES[dtype]))
    about = fast.accelerate(model, weights, "off" if plain else "auto")
    print(f"  {model_class.__name__} {dtype}: {about}", file=sys.stderr, flush=True)

    def run(prompt, new):
        times, start = [], time.perf_counter()
        [tokens] = model.generate([prompt], new, temperature=0, stop=(),
                                  on_token=lambda row, token: times.append(time.perf_counter() - start))
        return times, tokens
    run.model, run.about = model, about
    return run


class Times:
    """A transformers streamer: when each token came. The first that comes is the prompt."""

    def __init__(self):
        self.start, self.times = time.perf_counter(), []

    def put(self, tokens):
        self.times.append(time.perf_counter() - self.start)

    def end(self):
        pass


def transformers(folder, dtype, prompt):
    """transformers with what is fastest of its attentions and caches for this prompt."""
    from transformers import AutoModelForCausalLM
    model = in_memory(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval())

    def variant(attention, cache):
        def run(prompt, new):
            model.set_attn_implementation(attention)
            tokens, streamer = torch.tensor([prompt]), Times()
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
                                 do_sample=False, eos_token_id=None, pad_token_id=0,
                                 cache_implementation=cache, streamer=streamer)
            return streamer.times[1:], out[0, len(prompt):].tolist()
        run.model, run.about = model, f"transformers {attention}, {cache or 'dynamic'} cache"
        return run
    runs = [variant(*kind) for kind in itertools.product(("sdpa", "eager"), (None, "static"))]
    return min(runs, key=lambda run: min(between(run(prompt, 9)[0]) for _ in range(3)))


def rwkv_package(file, dtype):
    """The rwkv package, called token by token as its own examples do."""
    from rwkv.model import RWKV
    model = RWKV(model=str(file).removesuffix(".pth"), strategy=f"cpu {dtype}", verbose=False)

    def run(prompt, new):
        times, tokens, start = [], [], time.perf_counter()
        with torch.no_grad():
            logits, state = model.forward(prompt, None)
            while True:
                tokens.append(int(logits.argmax()))
                times.append(time.perf_counter() - start)
                if len(tokens) == new:
                    return times, tokens
                logits, state = model.forward(tokens[-1:], state)
    run.about = "rwkv package"
    return run


WORKER = r'''
import ctypes, json, sys, time
import gguf, llama_cpp, numpy
folder, threads = sys.argv[1], int(sys.argv[2])
told = json.load(open(folder + "/sizes.json"))
quiet = llama_cpp.llama_log_callback(lambda *_: None)                   # must outlive its use
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
def write(kind):
    path = f"{folder}/{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in told.items():
        getattr(writer, name)(value)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in numpy.load(folder + "/weights.npz").items():
        if tensor.ndim > 1 and kind != "F32":
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
    writer.close()
    return path
contexts = {}
def open_model(kind):
    p = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(write(kind).encode(), p)
    p = llama_cpp.llama_context_default_params()
    p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = 8192, 512, 512, threads, threads
    contexts[kind] = llama_cpp.llama_init_from_model(model, p), model
def run(kind, prompt, new):
    context, model = contexts[kind]
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    size = told["add_vocab_size"]
    def feed(tokens):
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens))) == 0
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(numpy.ctypeslib.as_array(logits, (size,)).argmax())
    times, tokens, start = [], [], time.perf_counter()
    for i in range(0, len(prompt), 512):
        token = feed(prompt[i:i + 512])
    while True:
        tokens.append(token); times.append(time.perf_counter() - start)
        if len(tokens) == new:
            return times, tokens
        token = feed([token])
for line in sys.stdin:
    kind, prompt, new = json.loads(line)
    if kind not in contexts:
        open_model(kind)
    print(json.dumps(run(kind, prompt, new)), flush=True)
'''


def llama_cpp(python, model, folder):
    """A function kind -> side: llama.cpp on the same weights, in a process of its own."""
    import numpy as np
    c, tensors = model.config, model.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}
    arrays = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        layer = "".join(f"blk.{stem.split('.')[2]}." for _ in range(stem.startswith("model.layers.")))
        stem = stem.split(".", 3)[3] if layer else stem
        if stem.endswith(("q_proj", "k_proj")):      # halves -> neighbours: its rotation is Meta's
            tensor = tensor.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        arrays[f"{layer}{names[stem]}.weight"] = tensor.float().numpy()
    np.savez(folder / "weights.npz", **arrays)
    (folder / "sizes.json").write_text(json.dumps(dict(
        add_context_length=c.max_position_embeddings, add_embedding_length=c.hidden_size,
        add_block_count=c.num_hidden_layers, add_feed_forward_length=c.intermediate_size,
        add_head_count=c.num_attention_heads, add_head_count_kv=c.num_key_value_heads,
        add_layer_norm_rms_eps=c.rms_norm_eps, add_rope_freq_base=c.rope_theta,
        add_rope_dimension_count=c.head_dim, add_vocab_size=c.vocab_size)))
    worker = subprocess.Popen([python, "-c", WORKER, str(folder), str(torch.get_num_threads())],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def side(kind):
        def run(prompt, new):
            worker.stdin.write(json.dumps([kind, prompt, new]) + "\n")
            worker.stdin.flush()
            return json.loads(worker.stdout.readline())
        run.about = f"llama.cpp {kind}"
        return run
    return side

# --------------------------------------------------------------------------------------- measuring


def between(times):
    """Seconds from token to token, on average."""
    return (times[-1] - times[0]) / (len(times) - 1)


def in_turns(functions, repeats):
    """{name: median of `repeats` values} of functions that take turns, each called once before.

    Where that first call takes more than SLOW seconds, its value is all that is measured.
    """
    values = {}
    for name, function in functions.items():
        start = time.perf_counter()
        value = function()
        values[name] = [value] if time.perf_counter() - start > SLOW else []
    slow = [name for name, found in values.items() if found]
    for _ in range(repeats):
        for name, function in functions.items():
            if name not in slow:
                values[name].append(function())
    if slow:
        print(f"  measured once, being slower than {SLOW} s: {', '.join(map(str, slow))}\n", flush=True)
    return {name: statistics.median(found) for name, found in values.items()}


def header(title, *columns):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def row(name, ours, theirs, what, target, rate=lambda seconds: 1 / seconds):
    """A line: the rates of both sides, and the factor between them, against the least wanted."""
    factor = theirs / ours
    print(f"| {name} | {rate(ours):.1f} | {rate(theirs):.1f} ({what}) | {factor:.2f} | {target or ''} |",
          flush=True)


def agreement(left, right):
    """How far two greedy continuations agree."""
    same = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), len(left))
    return "the same tokens" if same == len(left) else f"the same {same} of {len(left)} tokens"


def compare(title, sides, pairs, prompt, args, new=NEW):
    """Decode after `prompt` with all sides in turns; one line for each (name, ours, theirs, least)."""
    def decode(side):
        side(prompt[:8], 2)
        return between(side(prompt, new)[0])
    seconds = in_turns({name: lambda side=side: decode(side) for name, side in sides.items()},
                       args.repeats)
    header(title, "decode", "tokens/s", "against", "factor", "at least")
    for name, left, right, target in pairs:
        if left in seconds and right in seconds:
            same = ""
            if name.endswith("fp32"):
                same = f", {agreement(sides[left](prompt, NEW)[1], sides[right](prompt, NEW)[1])}"
            row(name, seconds[left], seconds[right], sides[right].about + same, target)
    return seconds


def compare_prompts(title, sides, pairs, vocabulary, args):
    """Prompts of 512 tokens, up to the first new token."""
    prompt = some_tokens(512, vocabulary)

    def first_token(side):
        side(prompt[:8], 2)
        return side(prompt, 1)[0][0]
    seconds = in_turns({name: lambda side=side: first_token(side) for name, side in sides.items()},
                       args.repeats)
    header(title, "prompt of 512", "tokens/s", "against", "factor", "at least")
    for name, left, right, target in pairs:
        if left in seconds and right in seconds:
            row(name, seconds[left], seconds[right], sides[right].about, target, lambda s: 512 / s)


def bare_products(models, seconds, args):
    """The products of a token alone, by the fastest operator of each kind, and their part of a token."""
    header("The time of the bare products over the time of a token", "GPT-2 124M", "operator",
           "products, ms", "token, ms", "part", "at least")
    passes = {}
    for name, (dtype, weights, _) in models.items():
        kind = fast.KINDS[weights]
        linears = [torch.nn.Linear(*shape).to(DTYPES[dtype]) for shape in gpt2_shapes()]
        for operator in sorted({operator for store in kind.STORES for operator in store}):
            with torch.no_grad():
                try:
                    layers = [kind(linear, (operator,) * 3) for linear in linears]
                    inputs = [torch.randn(1, 1, linear.in_features).to(DTYPES[dtype]) for linear in linears]
                    layers[0](inputs[0])
                except (RuntimeError, AttributeError):
                    continue

            def one_pass(layers=layers, inputs=inputs):
                start = time.perf_counter()
                with torch.no_grad():
                    for layer, x in zip(layers, inputs):
                        layer(x)
                return time.perf_counter() - start
            if min(one_pass() for _ in range(3)) < 0.2:
                passes[name, operator] = one_pass
    found = in_turns(passes, 3 * args.repeats)
    for name, (_, _, target) in models.items():
        products, operator = min((value, key[1]) for key, value in found.items() if key[0] == name)
        print(f"| {name} | {operator} | {1e3 * products:.1f} | {1e3 * seconds[name]:.1f} | "
              f"{products / seconds[name]:.2f} | {target} |", flush=True)


def gpt2_shapes():
    """(K, N) of the products of one token of GPT-2 124M."""
    C = 768
    return [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * 12 + [(C, 50257)]

# ------------------------------------------------------------------------------------------- tables


def rows_gpt(args, folder):
    torch.manual_seed(0)
    gpt.GPT(gpt.SIZES["gpt2"]).save_pretrained(folder)
    prompt = some_tokens(64, 50257)
    models = {"fp32": ("fp32", None, 0.82), "bf16": ("bf16", None, 0.75), "int8": ("bf16", "int8", 0.65),
              "int4": ("bf16", "int4", 0.5)}
    sides = {name: ours(folder, gpt.GPT, dtype, weights) for name, (dtype, weights, _) in models.items()}
    sides["plain fp32"] = ours(folder, gpt.GPT, "fp32", plain=True)
    sides |= {f"transformers {dtype}": transformers(folder, dtype, prompt) for dtype in DTYPES}
    pairs = [("fp32", "fp32", "transformers fp32", 1.5), ("bf16", "bf16", "transformers bf16", 1.3),
             ("int8", "int8", "transformers bf16", 2.4), ("int4", "int4", "transformers bf16", None),
             ("--fast off, fp32", "plain fp32", "transformers fp32", None)]
    seconds = compare("GPT-2 124M", sides, pairs, prompt, args)
    compare_prompts("GPT-2 124M", sides, [(*pair[:3], least) for pair, least in
                                          zip(pairs, (1.5, 1.2, None, None, None))], 50257, args)
    bare_products(models, seconds, args)


def rows_llama(args, folder):
    torch.manual_seed(0)
    model = llama3.Llama3(LLAMA)
    model.save_pretrained(folder)
    prompt = some_tokens(64, 32000)
    sides = {"fp32": ours(folder, llama3.Llama3, "fp32"), "bf16": ours(folder, llama3.Llama3, "bf16"),
             "int8": ours(folder, llama3.Llama3, "bf16", "int8"),
             "int4": ours(folder, llama3.Llama3, "bf16", "int4")}
    sides |= {f"transformers {dtype}": transformers(folder, dtype, prompt) for dtype in DTYPES}
    pairs = [("fp32", "fp32", "transformers fp32", 1.5), ("bf16", "bf16", "transformers bf16", 1.25),
             ("int8", "int8", "transformers bf16", None), ("int4", "int4", "transformers bf16", None)]
    if args.llama_python:
        side = llama_cpp(args.llama_python, model, folder)
        for name, kind in (("fp32", "F32"), ("bf16", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_0")):
            sides[kind] = side(kind)
            pairs.append((name, name, kind, 0.9))
    compare("Llama 125M", sides, pairs, prompt, args)
    least = {"fp32": 1.5, "bf16": 1.2}
    compare_prompts("Llama 125M", sides, [
        (*pair[:3], least.get(pair[0])) for pair in pairs], 32000, args)


def rows_long(args, folder):
    """Decoding at context 4,000, and what unused slots of a cache cost."""
    torch.manual_seed(0)
    llama3.Llama3(LLAMA).save_pretrained(folder)
    prompt = some_tokens(4000, 32000)
    sides = {dtype: ours(folder, llama3.Llama3, dtype) for dtype in DTYPES}
    sides |= {f"transformers {dtype}": transformers(folder, dtype, prompt) for dtype in DTYPES}
    compare("Llama 125M at context 4,000", sides,
            [("fp32", "fp32", "transformers fp32", 1.2), ("bf16", "bf16", "transformers bf16", 2.5)],
            prompt, args)
    header("Unused slots", "decode after 64 tokens", "tokens/s", "against", "factor", "at least")
    few = {}
    for dtype in DTYPES:
        for slots in (128, 8192):
            def run(model=sides[dtype].model, slots=slots):
                times = []
                model.generate([prompt[:64]], NEW, state=model.new_state(1, slots), temperature=0, stop=(),
                               on_token=lambda row, token: times.append(time.perf_counter()))
                return between(times)
            few[dtype, slots] = run
    seconds = in_turns(few, args.repeats)
    for dtype in DTYPES:
        row(f"{dtype}, 8,192 slots", seconds[dtype, 8192], seconds[dtype, 128], "128 slots", 1.0)


def rows_batch(args, folder):
    """16 prompts of 16 to 256 tokens, 32 new tokens each."""
    torch.manual_seed(0)
    gpt.GPT(gpt.SIZES["gpt2"]).save_pretrained(folder)
    lengths = torch.linspace(16, 256, 16).long().tolist()
    prompts = [some_tokens(length, 50257, seed) for seed, length in enumerate(lengths)]
    longest = max(lengths)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])
    header("16 prompts of 16 to 256 tokens, GPT-2 124M", "32 new tokens each", "tokens/s", "against",
           "factor", "at least")
    for dtype in DTYPES:
        model = ours(folder, gpt.GPT, dtype).model
        other = transformers(folder, dtype, prompts[0])
        found = {}

        def run(model=model, found=found):
            start = time.perf_counter()
            found["ours"] = model.generate(prompts, NEW, temperature=0, stop=())
            return time.perf_counter() - start

        def run_other(other=other.model, found=found):
            start = time.perf_counter()
            out = other.generate(padded, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
                                 eos_token_id=None, pad_token_id=0)
            found["theirs"] = out[:, longest:].tolist()
            return time.perf_counter() - start
        seconds = in_turns({"ours": run, "theirs": run_other}, args.repeats)
        same = sum(a == b for a, b in zip(found["ours"], found["theirs"]))
        row(dtype, seconds["ours"], seconds["theirs"], f"transformers, padded; {same} of 16 texts the same",
            1.5, lambda s: 16 * NEW / s)


def rows_rwkv(args, folder):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = rwkv6.RWKV6(rwkv6.RWKV6Config.sized(12, 768, 65536, 1024))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        for name, parameter in model.named_parameters():                # decays as in trained models
            if name.endswith("time_decay"):
                parameter.uniform_(-6.0, -1.0)
            if ".ln" in name or name.startswith("ln") and name.endswith("weight"):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.save_pretrained(folder)
    sides = {dtype: ours(folder, rwkv6.RWKV6, dtype) for dtype in DTYPES}
    sides["int8"] = ours(folder, rwkv6.RWKV6, "bf16", "int8")
    sides |= {f"rwkv {dtype}": rwkv_package(folder / "model.pth", dtype) for dtype in DTYPES}
    pairs = [("fp32", "fp32", "rwkv fp32", 1.6), ("bf16", "bf16", "rwkv bf16", 1.2),
             ("int8", "int8", "rwkv bf16", None)]
    compare("RWKV-6 197M", sides, pairs, some_tokens(64, 65536), args)
    compare_prompts("RWKV-6 197M", sides, [(*pair[:3], 1.5) for pair in pairs], 65536, args)


MINIMAL = """import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = tokenizer(sys.argv[2], return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=1, do_sample=False)[0]))
"""


def rows_start(args, folder):
    """From the command line to the first token, with a checkpoint of 500 MB."""
    import tokenizer as text
    torch.manual_seed(0)
    gpt.GPT(gpt.SIZES["gpt2"]).save_pretrained(folder)
    text.train_bpe([(ROOT / "tokenizer.py").read_text(encoding="utf-8")], 1000).save(folder)
    ask = "def forward(self, x):"
    commands = {"ours": [sys.executable, "chat.py", str(folder), "--prompt", ask, "--max-new-tokens", "1",
                         "--temperature", "0"],
                "theirs": [sys.executable, "-c", MINIMAL, str(folder), ask]}

    def run(command):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - start
    seconds = in_turns({name: lambda command=command: run(command) for name, command in commands.items()},
                       args.repeats)
    header("Command line to first token, a checkpoint of 500 MB", "", "seconds", "against", "factor",
           "at least")
    row("chat.py --prompt", seconds["ours"], seconds["theirs"], "a script of 5 lines with transformers", 1.0,
        lambda s: s)


@torch.no_grad()
def quality(args):
    """Perplexity on held-out text, and the distance from the distributions of the stored weights."""
    import tokenizer as text
    from checkpoints import load_checkpoint
    tokenizer = text.load_tokenizer(args.quality)
    files = args.text or sorted([*ROOT.glob("*.py"), *ROOT.glob("lineage/*.py")])
    tokens = [token for file in files for token in tokenizer.encode(file.read_text(encoding="utf-8"))]
    model = load_checkpoint(args.quality)
    length = min(model.config.context or 512, 512)
    blocks = torch.tensor(tokens[:len(tokens) // length * length][:args.tokens]).view(-1, length)

    def log_probabilities(model):
        for block in blocks:
            yield block[1:], model(block[None])[0, :-1].float().log_softmax(-1)
    header(f"Quality of {args.quality}: {blocks.numel():,} tokens of {files[0].name} to {files[-1].name}",
           "weights", "perplexity", "change", "KL, nats/token", "the same most likely token")
    stored = [(right, log_p.half()) for right, log_p in log_probabilities(model)]
    base = -sum(log_p.float().gather(1, right[:, None]).sum() for right, log_p in stored)
    count = sum(len(right) for right, _ in stored)
    print(f"| as stored | {(base / count).exp():.3f} | | | |", flush=True)
    for weights in ("int8", "int4"):
        model = load_checkpoint(args.quality)
        fast.accelerate(model, weights)
        loss = divergence = same = 0.0
        for (right, log_p), (_, log_q) in zip(stored, log_probabilities(model)):
            loss -= log_q.gather(1, right[:, None]).sum()
            divergence += F.kl_div(log_q, log_p.float(), log_target=True, reduction="sum")
            same += (log_q.argmax(-1) == log_p.argmax(-1)).sum()
        print(f"| {weights} | {(loss / count).exp():.3f} | {((loss - base) / count).exp() - 1:+.2%} | "
              f"{divergence / count:.5f} | {same / count:.1%} |", flush=True)


TABLES = {"gpt": rows_gpt, "llama": rows_llama, "long": rows_long, "batch": rows_batch, "rwkv": rows_rwkv,
          "start": rows_start}


def versions():
    """The machine, and what is compared."""
    from importlib.metadata import PackageNotFoundError, version
    told = []
    for package in ("torch", "transformers", "rwkv"):
        try:
            told.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            told.append(f"no {package}")
    return (f"{os.cpu_count()} cores ({fast.processor()}), {torch.get_num_threads()} threads; "
            f"{platform.system()}, Python {platform.python_version()}, {', '.join(told)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default=",".join(TABLES), help=f"of {', '.join(TABLES)} (all)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of every side (7)")
    parser.add_argument("--threads", type=int, help="of both sides (as torch chooses)")
    parser.add_argument("--llama-python", metavar="PYTHON", help="one that has llama-cpp-python and gguf")
    parser.add_argument("--quality", type=Path, metavar="DIR", help="a trained checkpoint; no speed then")
    parser.add_argument("--text", type=Path, nargs="*", metavar="FILE", help="held-out text of --quality")
    parser.add_argument("--tokens", type=int, default=16384, help="of held-out text (16384)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if unknown := {*args.rows.split(",")} - {*TABLES}:
        parser.error(f"--rows {', '.join(unknown)}: one of {', '.join(TABLES)}")
    print(versions(), flush=True)
    if args.quality:
        quality(args)
        return
    for name in args.rows.split(","):
        with tempfile.TemporaryDirectory() as folder:
            TABLES[name](args, Path(folder))


if __name__ == "__main__":
    main()
