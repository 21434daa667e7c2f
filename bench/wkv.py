"""RWKV-6 against attention: the operator, whole models, and what a token costs after many.

    python bench/wkv.py | tee bench/wkv.log

Everything that is compared runs alternately in this one process (A, B, A, B, ...), and medians are
compared: on a machine that others use, only the ratios mean something. On CUDA the same tables
follow in bf16, with flash-linear-attention's kernel in the first one if its package is installed.
"""
import argparse
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gpt import GPT, GPTConfig                                          # noqa: E402
from rwkv6 import CHUNK, RWKV6, RWKV6Config, wkv6, wkv6_loop            # noqa: E402


def race(contestants, repeats, device):
    """{name: function without arguments} -> {name: median seconds}, run alternately."""
    took = {name: [] for name in contestants}
    for _ in range(repeats + 1):             # the first round warms up, and compiles
        for name, function in contestants.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            took[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in took.items()}


# --- the operator ---

def attention(r, k, v, w, u, S):
    return F.scaled_dot_product_attention(r, k, v, is_causal=True), S


def flash_linear_attention():
    """chunk_rwkv6 with our axes, or None if the package is not there."""
    try:
        from fla.ops.rwkv6 import chunk_rwkv6
    except ImportError:
        return None

    def theirs(r, k, v, w, u, S):            # (B, T, H, D) there, and by itself scaled
        r, k, v, w = (x.transpose(1, 2).contiguous() for x in (r, k, v, w))
        y, S = chunk_rwkv6(r, k, v, w, u, scale=1.0, initial_state=S, output_final_state=True)
        return y.transpose(1, 2), S
    return theirs


def operands(B, H, T, D, device, dtype):
    torch.manual_seed(0)
    r, k, v = torch.randn(3, B, H, T, D)
    w = -torch.exp(torch.rand(B, H, T, D) * 7 - 6)                      # decays of 0.998 to 0.07
    u, S = torch.randn(H, D), torch.randn(B, H, D, D)
    r, k, v = (x.to(device, dtype) for x in (r, k, v))
    return [x.requires_grad_() for x in (r, k, v, *(x.to(device) for x in (w, u, S)))]


def peaks(device):
    """(FLOP/s of a large fp32 matrix product, bytes/s of a large copy) of this device, measured."""
    a, b = torch.randn(2, 1536, 1536, device=device)
    c, d = torch.empty(2, 2**25, device=device)
    took = race({"product": lambda: torch.mm(a, b), "copy": lambda: c.copy_(d)}, 9, device)
    return 2 * 1536**3 / took["product"], 2 * 4 * 2**25 / took["copy"]


def operator_table(B, H, T, D, device, dtype, repeats):
    inputs = operands(B, H, T, D, device, dtype)
    dy, dS = torch.randn(B, H, T, D, device=device), torch.randn(B, H, D, D, device=device)

    def both(operator):
        def run():
            y, S = operator(*inputs)
            torch.autograd.grad((y, S), inputs, (dy.to(y.dtype), dS), allow_unused=True)
        return run
    contestants = {"attention": both(attention), "wkv6": both(wkv6),
                   "wkv6, compiled": both(torch.compile(wkv6))}
    theirs = flash_linear_attention() if device == "cuda" else None
    if theirs:
        contestants["flash-linear-attention"] = both(theirs)
        error = (theirs(*inputs)[0].float() - wkv6(*inputs)[0]).abs().max()
        print(f"largest difference between theirs and ours: {error:.2g}")
    took = race(contestants, repeats, device)
    slow = race({"attention": both(attention), "token loop": both(wkv6_loop)}, 3, device)
    took["token loop"] = slow["token loop"] / slow["attention"] * took["attention"]

    flops, rate = peaks(device)
    each = 3 * 2 * (1.5 * CHUNK * D + 2 * D * D)        # backward is two forwards; A, A v, k v, r S
    products = B * H * T * each
    moved = B * H * T * D * (9 * inputs[0].element_size() + 5 * 4)      # w, y and theirs are fp32
    floor = max(products / flops, moved / rate)
    print(f"\noperator, forward and backward, B={B} H={H} T={T} D={D}, {dtype}, {device}")
    print(f"  floor: {products / 1e9:.2f} GFLOP of products at the {flops / 1e9:.0f} GFLOP/s of a "
          f"large one: {1e3 * products / flops:.2f} ms;")
    print(f"         {moved / 1e6:.0f} MB in and out at {rate / 1e9:.1f} GB/s: "
          f"{1e3 * moved / rate:.2f} ms. The gap is what each form takes of the larger one:")
    for name, seconds in took.items():
        print(f"  {name:22}{1e3 * seconds:8.2f} ms = {seconds / took['attention']:6.2f} x attention"
              f"; gap{seconds / floor:5.1f};{took['token loop'] / seconds:6.1f} x the loop's speed",
              flush=True)


# --- whole models ---

def pair(T, device):
    """An RWKV-6 of 6 layers x 384 and vocabulary 4,096, and a GPT with as many parameters."""
    def count(model):
        return sum(p.numel() for p in model.parameters())
    ours = RWKV6(RWKV6Config.sized(6, 384, 4096, T))
    config = GPTConfig.sized(6, 384, 4096, T)
    with torch.device("meta"):
        missing = count(ours) - count(GPT(config))
    theirs = GPT(replace(config, n_inner=config.n_inner + round(missing / (6 * (2 * 384 + 1)))))
    return ours.to(device), theirs.to(device), count(ours), count(theirs)


def training_table(device, dtype, lengths, tokens, repeats):
    print(f"\ntraining step (forward, loss, backward), 6 layers x 384, V = 4096, {device}, "
          f"{'bf16 autocast' if dtype == torch.bfloat16 else 'fp32'}: tokens/s of rwkv6 / of gpt")
    print("  the compiled ones: block by block, as `for block in model.blocks: block.compile()`")
    for T in lengths:
        B = max(1, tokens // T)
        x = torch.randint(4096, (B, T + 1), device=device)
        line = f"  T = {T:5} B = {B:3}"
        for compiled in (False, True):
            ours, theirs, size, other = pair(T, device)
            if compiled:
                torch.compiler.reset()
                for block in [*ours.blocks, *theirs.h]:
                    block.compile()

            def step(model):
                with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                    logits = model(x[:, :-1])
                F.cross_entropy(logits.float().flatten(0, 1), x[:, 1:].flatten()).backward()
                model.zero_grad()
            start = time.perf_counter()
            took = race({"ours": lambda: step(ours), "gpt": lambda: step(theirs)}, repeats, device)
            line += (f"   {'compiled' if compiled else 'eager'} {B * T / took['ours']:8.0f} / "
                     f"{B * T / took['gpt']:8.0f} = {took['gpt'] / took['ours']:5.2f}")
            if compiled:
                line += f"   ({time.perf_counter() - start:.0f} s with compiling)"
        print(line, flush=True)
    print(f"  parameters: {size:,} and {other:,}")


@torch.no_grad()
def decoding_table(device, dtype, far, repeats):
    ours, theirs, *_ = pair(4096, device)
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype).eval()
    states, took_to_read = {}, 0.0
    for position in (10, far):
        states[position] = ours.new_state(1)
        tokens = torch.randint(4096, (1, position), device=device)
        start = time.perf_counter()
        for piece in tokens.split(512, dim=1):
            ours.hidden(piece, states[position])
        took_to_read = time.perf_counter() - start
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    contestants = {f"rwkv6 at position {position:,}": lambda s=state: ours(token, s)
                   for position, state in states.items()}
    for room in (16, 4096):                  # a cache is read as a whole, as long as it is made
        cache = theirs.new_state(1, room)
        start_at = cache.position.clone()

        def one(cache=cache, start_at=start_at):
            cache.position.copy_(start_at)
            theirs(token, cache)
        contestants[f"gpt with a cache of {room:,}"] = one
    took = race(contestants, repeats, device)
    first = next(iter(took.values()))
    print(f"\none token, 6 layers x 384, {device}, {dtype}; a prompt of {far:,} ids was read at "
          f"{far / took_to_read:,.0f} tokens/s")
    for name, seconds in took.items():
        print(f"  {name:28} {1e3 * seconds:7.2f} ms = {seconds / first:5.2f} x the first")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--far", type=int, default=100_000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        names = re.findall(r"model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:                          # not Linux
        names = []
    print(f"{os.cpu_count()} cores ({[*names, 'unknown'][0]}), {args.threads} threads; "
          f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
          + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
    operator_table(4, 6, 512, 64, "cpu", torch.float32, args.repeats)
    training_table("cpu", torch.float32, args.lengths, 2048, max(3, args.repeats // 3))
    decoding_table("cpu", torch.float32, args.far, 40)
    if torch.cuda.is_available():
        operator_table(4, 6, 512, 64, "cuda", torch.bfloat16, 30)
        operator_table(8, 32, 4096, 64, "cuda", torch.bfloat16, 10)
        training_table("cuda", torch.bfloat16, args.lengths, 32768, 10)
        decoding_table("cuda", torch.bfloat16, args.far, 100)


if __name__ == "__main__":
    main()
