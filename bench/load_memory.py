"""Memory and time that loading takes: a full-size checkpoint of random weights, in each layout.

    python bench/load_memory.py | tee bench/load_memory.log

Each layout is written into a temporary folder, read once to warm the cache of the system, then
loaded in a fresh process, which reports the peak of its resident memory over what torch itself
takes (VmHWM of /proc), and then reads every weight once: from_pretrained maps files, so only then
have all the bytes moved. Beside it: the time that only reading the files takes, piece by piece into
one small buffer (as cat does), and all of them into new memory (as a loader that copies must).
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from llama3 import META, SIZES, Llama3                                  # noqa: E402


def write_meta(model, folder, shards=1, copies=1, by_width=False):
    """Write a Llama3 as Meta does: params.json and consolidated.NN.pth.

    copies: how often each key/value head is stored. by_width: the token table is divided along its
    width, as in Llama 2.
    """
    config, names = model.config, {ours: (name, axis) for name, (ours, axis) in META.items()}
    tensors = model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(shards):
        shard = {}
        for ours, tensor in tensors.items():
            layer, inner = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*)\.weight", ours).groups()
            name, axis = names[inner]
            if name in ("attention.wk", "attention.wv"):
                heads = tensor.unflatten(0, (-1, config.head_dim))      # (K, D, C)
                tensor = heads.repeat_interleave(copies, 0).flatten(0, 1) if copies > 1 else tensor
            if name in ("attention.wq", "attention.wk"):                # halves -> neighbours
                halves = tensor.unflatten(0, (-1, 2, config.head_dim // 2))
                tensor = halves.transpose(1, 2).flatten(0, 2)
            axis = 1 if name == "tok_embeddings" and by_width else axis
            part = tensor if axis is None else tensor.chunk(shards, axis)[rank]
            shard[f"{layer or ''}{name}.weight"] = part.clone()
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    params = dict(dim=config.hidden_size, n_layers=config.num_hidden_layers,
                  n_heads=config.num_attention_heads,
                  n_kv_heads=copies * config.num_key_value_heads, vocab_size=config.vocab_size,
                  multiple_of=256, norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta)
    if config.rope_factor != 1:
        params["use_scaled_rope"] = True
    (folder / "params.json").write_text(json.dumps(params))


def write(layout, size, folder):
    """A checkpoint of random bf16 weights of this size, in "hf", "meta" or "meta-N" layout."""
    with torch.device("meta"):
        model = Llama3(SIZES[size]).bfloat16()
    model = model.to_empty(device="cpu")                                # separates tied weights
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    torch.manual_seed(0)
    model.initialise()
    if layout == "hf":
        model.save_pretrained(folder)
    else:
        write_meta(model, folder, int(layout.removeprefix("meta").removeprefix("-") or 1))


def memory(field):
    """Bytes of this process: VmHWM is the peak of what is resident, RssAnon what is no file."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def weight_files(folder):
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")])


def read(folder):
    """Seconds that reading all weight files takes, piece by piece."""
    buffer, start = bytearray(2**24), time.perf_counter()
    for file in weight_files(folder):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_whole(folder):
    """Seconds that reading all weight files takes, into memory of their size."""
    start = time.perf_counter()
    memories = [bytearray(file.stat().st_size) for file in weight_files(folder)]
    for file, memory_ in zip(weight_files(folder), memories):
        with open(file, "rb", buffering=0) as opened:
            rest = memoryview(memory_)
            while rest:
                rest = rest[opened.readinto(rest):]
    return time.perf_counter() - start


def load(folder):
    """Load in this process; the measurements as a dict."""
    before, anonymous, start = memory("VmHWM"), memory("RssAnon"), time.perf_counter()
    model = Llama3.from_pretrained(folder)
    loaded = time.perf_counter() - start
    peak = memory("VmHWM") - before
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.int64).sum()
    return {"load": loaded, "used": time.perf_counter() - start, "peak": peak,
            "peak_used": memory("VmHWM") - before, "anonymous": memory("RssAnon") - anonymous,
            "weights": sum(p.numel() * p.element_size() for p in model.parameters())}


def report(layout, folder):
    """Load in a fresh process and print what it took."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    read(folder)
    seconds, whole = read(folder), read_whole(folder)
    done = subprocess.run([sys.executable, __file__, "--load", folder], capture_output=True,
                          text=True, check=True)
    took = json.loads(done.stdout)
    files = len(weight_files(folder))
    print(f"\n{layout}: {files} file{'s' * (files > 1)}, {size / 1e9:.2f} GB; "
          f"the model is {took['weights'] / 1e9:.2f} GB")
    for what, time_, peak in (("from_pretrained", "load", "peak"),
                              ("and every weight read once", "used", "peak_used")):
        print(f"  {what:28} {took[time_]:6.2f} s   peak {took[peak] / 1e9:.2f} GB = "
              f"{took[peak] / size:.2f} x the files")
    print(f"  {'':28} {'':6}     of this peak, {took['anonymous'] / 1e9:.2f} GB are not pages of "
          f"the files")
    print(f"  only reading the files       {seconds:6.2f} s   piece by piece; "
          f"{whole:.2f} s into new memory", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="llama3.2-1b", choices=SIZES)
    parser.add_argument("--layouts", nargs="+", default=["hf", "meta", "meta-8"])
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)   # what the processes that
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)    # it starts are told to do
    args = parser.parse_args()
    if args.write:
        return write(args.layouts[0], args.size, args.write)
    if args.load:
        return print(json.dumps(load(args.load)))
    cpu = Path("/proc/cpuinfo").read_text()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    print(f"{args.size} in bf16, random weights; {os.cpu_count()} cores "
          f"({re.findall(r'model name.*: (.*)', cpu + 'model name: unknown')[0]}), {ram:.0f} GB, "
          f"{torch.get_num_threads()} thread(s); {platform.system()}, "
          f"Python {platform.python_version()}, torch {torch.__version__}")
    for layout in args.layouts:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--size", args.size, "--layouts", layout,
                            "--write", folder], check=True)             # its memory goes with it
            report(layout, Path(folder))


if __name__ == "__main__":
    main()
