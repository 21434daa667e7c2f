"""What cluster.py and --base-dtype bring: measured on this machine, two processes at most.

    python bench/cluster.py overlap input          seconds
    python bench/cluster.py shards lora            Llama-3.2-1B's shape with random weights: 8 GB of disk and of memory

overlap: a step on two processes, gradients reduced one after another at its end, or in buckets during the
         backward pass. input: what preparing a step's batches takes of the step.
shards:  peak memory of each of two processes that load a checkpoint of 2.5 GB in bf16 as fp32 shards, compute
         a loss, and publish. lora: of `finetune.py --lora 8` at context 512, for each --base-dtype.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def two_processes(*words) -> None:
    """Run a part of this file under torchrun."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           __file__, "--worker", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    print(done.stdout, end="", flush=True)


def model_and_batches(context=128):
    """A GPT of 6 x 256, a step's batches of random tokens."""
    from gpt import GPT, GPTConfig
    torch.manual_seed(0)
    tokens = torch.randint(4096, (4, context))
    return GPT(GPTConfig.sized(6, 256, 4096, context)).train(), [{"tokens": tokens, "targets": tokens}]


def overlap(run) -> None:
    """Step times of both ways, in turns."""
    import torch.distributed as dist
    import cluster
    from train import NextTokenLoss
    (model, [batch]), took = model_and_batches(), {}
    plain, buckets = NextTokenLoss(model), cluster.overlapping(NextTokenLoss(model), run)
    for _ in range(24):
        for name, loss in (("one after another, at the end", plain), ("in buckets, meanwhile", buckets)):
            dist.barrier()
            start = time.perf_counter()
            loss(batch)[0].backward()
            for p in model.parameters() if loss is plain else ():
                dist.all_reduce(p.grad)
            took.setdefault(name, []).append(time.perf_counter() - start)
            model.zero_grad()
    alone = []
    for _ in range(12):
        start = time.perf_counter()
        plain(batch)[0].backward()
        alone.append(time.perf_counter() - start)
        model.zero_grad()
    count = sum(p.numel() for p in model.parameters())
    run.say(f"\na GPT of {count:,} parameters, 512 tokens in each of two processes, forward and backward: medians")
    run.say(f"    {1e3 * statistics.median(alone[4:]):7.1f} ms  without reducing")
    for name, times in took.items():
        run.say(f"    {1e3 * statistics.median(times[4:]):7.1f} ms  {name}")


def shards(run, folder: str) -> None:
    """Peak memory of loading, of a gradient, of publishing."""
    import torch.distributed as dist
    import cluster
    from checkpoints import load_checkpoint
    from plan import peak_bytes
    from train import NextTokenLoss
    base = peak_bytes(run.device)

    def report(what):
        peaks = [None, None]
        dist.all_gather_object(peaks, (peak_bytes(run.device) - base) / 2**30)
        run.say(f"    {what:<44} {peaks[0]:.2f} and {peaks[1]:.2f} GB")
    loss = NextTokenLoss(load_checkpoint(folder).train())
    count = sum(p.numel() for p in loss.parameters())
    run.say(f"\nLlama-3.2-1B's shape, {count:,} parameters: {4 * count / 2**30:.2f} GB in fp32; peak memory of two "
            f"processes above the {base / 2**30:.2f} GB of torch")
    whole = cluster.shard(loss, run)
    report("checkpoint loaded into shards")
    tokens = torch.randint(1000, (1, 32))
    with torch.no_grad():
        loss({"tokens": tokens, "targets": tokens})
    report("the loss of 32 tokens computed")
    run.out = Path(folder)
    with tempfile.TemporaryDirectory() as place, cluster.gathered(whole, loss, run) as full:
        if run.rank == 0:
            full.model.save_pretrained(place)
            size = Path(place, "model.safetensors").stat().st_size
    run.say(f"    published: {size / 2**30:.2f} GB in fp32" if run.rank == 0 else "")
    report("published from a file mapped to memory")


def batches_share() -> None:
    """How long a step's batches take beside the step."""
    import numpy as np
    from process import Run
    from train import Batches, NextTokenLoss
    run = Run(torch.device("cpu"), torch.float32)
    ids = np.random.default_rng(0).integers(0, 4096, 5_000_000).astype(np.uint16)
    print("\npreparing the batches of a step, on one core")
    for tokens, context in ((1024, 128), (16384, 512), (491520, 1024)):
        batches = Batches(ids, context, tokens // context, 8, 0, run)
        batches(0)                           # the order of an epoch is made once
        start = time.perf_counter()
        for step in range(1, 6):
            batches(step)
        print(f"    {tokens:>7,} tokens of {context}: {1e3 * (time.perf_counter() - start) / 5:7.2f} ms", flush=True)
    model, [batch] = model_and_batches()
    loss, times = NextTokenLoss(model), []
    for _ in range(8):
        start = time.perf_counter()
        loss(batch)[0].backward()
        times.append(time.perf_counter() - start)
    print(f"    beside it, forward and backward of 512 tokens by a GPT of 6 x 256 here: {1e3 * min(times):.0f} ms")


def make_checkpoint(folder: Path) -> None:
    """Llama-3.2-1B's shape with small random weights in bf16."""
    from llama3 import SIZES, Llama3
    from tokenizer import load_tokenizer
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Llama3(SIZES["llama3.2-1b"])
    for name, p in [*model.named_parameters()]:
        new = torch.nn.Parameter(torch.ones(p.shape, dtype=torch.bfloat16) if p.dim() < 2 else
                                 torch.empty(p.shape, dtype=torch.bfloat16).normal_(std=0.02))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, new)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)


def lora(folder: Path, base: str) -> None:
    """Peak memory of finetune.py with --lora 8, from its log."""
    rows = [{"prompt": f"{i}?", "completion": "a long answer, " * 60} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "val.jsonl").write_text(json.dumps({"prompt": "?", "completion": "!"}) + "\n")  # to save time
    out = folder / f"run-{base}"
    words = ["finetune.py", "--task", "sft", "--init-from", folder, "--data", folder / "rows.jsonl", "--lora", "8",
             "--val", folder / "val.jsonl",
             "--base-dtype", base, "--context", "512", "--batch", "1", "--micro-batch", "1", "--steps", "1",
             "--eval-examples", "1", "--samples", "0", "--device", "cpu", "--keep", "last", "--save-minutes", "99",
             "--out", out]
    start = time.time()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    step = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines() if "peak_bytes" in line][-1]
    print(f"    --base-dtype {base:<9} peak {step['peak_bytes'] / 2**30:.2f} GB; one step of {512} tokens at context 512, "
          f"{512 / step['tokens_per_s']:.0f} s, {time.time() - start:.0f} s in all", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="overlap, input, shards, lora")
    parser.add_argument("--bases", nargs="+", default=["bfloat16", "int8", "int4"], help="of lora")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is, or is made (a temporary folder)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        from argparse import Namespace
        from process import start_run
        part, *more = args.worker
        run = start_run(Namespace(device="cpu", dtype="float32", shard=part == "shards"), time.time())
        {"overlap": overlap, "shards": shards}[part](run, *more)
        return torch.distributed.destroy_process_group()
    print(f"torch {torch.__version__}, {platform.machine()} CPU, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        if {"shards", "lora"} & {*args.parts} and not (folder / "model.safetensors").exists():
            make_checkpoint(folder)
        for part in args.parts:
            if part == "overlap":
                two_processes(part)
            elif part == "input":
                batches_share()
            elif part == "shards":
                two_processes(part, folder)
            elif part == "lora":
                print("\nLlama-3.2-1B's shape, --lora 8, context 512, one sequence at once: peak memory of the process")
                for base in args.bases:
                    lora(folder, base)


if __name__ == "__main__":
    main()
