"""Files that are well-formed and lie, and a way to open one of them without harm.

`CHECKPOINTS` and `TOKENIZERS` have writers: (an intact folder) changes one file in it. `attempt` opens
what is there in a child process that may take 10 seconds, 1 GB beyond the file, write nothing and
start nothing.
"""
import json
import os
import pickle
import resource
import signal
import struct
import sys
import traceback
import zipfile

import torch

SECONDS, MEMORY = 10, 1 << 30


def header(change):
    """Edit the header of model.safetensors; `change` gets the dict and returns one, or text."""
    def write(folder):
        file = folder / "model.safetensors"
        data = file.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        made = change(json.loads(data[8:8 + size]))
        made = (made if isinstance(made, str) else json.dumps(made)).encode()
        file.write_bytes(struct.pack("<Q", len(made)) + made + data[8 + size:])
    return write


def first(stated, **changes):
    """The header with other values of its first tensor."""
    name = next(name for name in stated if name != "__metadata__")
    return {**stated, name: {**stated[name], **changes}}


def twice(stated):
    name = next(name for name in stated if name != "__metadata__")
    return json.dumps(stated)[:-1] + f", {json.dumps(name)}: {json.dumps(stated[name])}}}"


def length(number):
    def write(folder):
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", number) + file.read_bytes()[8:])
    return write


def index(place):
    """An index of shards that names one place for every tensor."""
    def write(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": {"wte.weight": place, "model.embed_tokens.weight": place}}))
        if place == "pipe.bin":
            os.mkfifo(folder / place)
        elif place == "device.bin":
            os.symlink("/dev/zero", folder / place)
        elif place == "loop.safetensors":
            os.symlink(place, folder / place)
    return write


def config(**changes):
    def write(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return write


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def bin_of(make):
    """pytorch_model.bin in place of the safetensors; `make` gets its path."""
    def write(folder):
        (folder / "model.safetensors").unlink()
        make(folder / "pytorch_model.bin")
    return write


def bomb(path, size=1 << 32):
    """A zip of a megabyte or so, whose data.pkl is of gigabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as content:
        with content.open("archive/data.pkl", "w", force_zip64=True) as member:
            for _ in range(size >> 26):
                member.write(bytes(1 << 26))
        content.writestr("archive/version", "3\n")


def laughs(path):
    """Thirty lists, each with the one before ten times: small in memory, endless when printed."""
    nested = ["ha"]
    for _ in range(30):
        nested = [nested] * 10
    torch.save({"model_args": {"n_layer": nested}, "wte.weight": nested, "model": {}}, path)


def deep(path):
    path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")


class Endless:
    """Pickled as a call: what is run if somebody lets a pickle run."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(function, *arguments):
    def make(path):
        torch.save({"wte.weight": Endless(function, *arguments)}, path)
    return make


def claims(shape, stride):
    """A tensor of more numbers than its storage has: by strides of 0, it is well-formed."""
    def make(path):
        torch.save({"wte.weight": torch.zeros(1).as_strided(shape, stride)}, path)
    return make


BIG = 10**9
GPT = {f"gpt config {field} {value}": config(**{field: value}) for value in (BIG, 2**63, -BIG)
       for field in ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size")}
LLAMA = {f"llama config {field} {value}": config(**{field: value}) for value in (BIG, 2**63) for field in (
    "num_hidden_layers", "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "max_position_embeddings", "vocab_size")}
CHECKPOINTS = {
    "negative offsets": header(lambda h: first(h, data_offsets=[-8, 8])),
    "offsets of 2^60": header(lambda h: first(h, data_offsets=[2**60, 2**60 + 8])),
    "offsets of 2^64": header(lambda h: first(h, data_offsets=[0, 2**64])),
    "overlapping offsets": header(lambda h: {name: {**t, "data_offsets": [0, t["data_offsets"][1] - t["data_offsets"][0]]}
                                             if name != "__metadata__" else t for name, t in h.items()}),
    "offsets the wrong way round": header(lambda h: first(h, data_offsets=[8, 0])),
    "shape of 2^60": header(lambda h: first(h, shape=[2**60])),
    "shape of 2^32 times 2^32": header(lambda h: first(h, shape=[2**32, 2**32])),
    "negative shape": header(lambda h: first(h, shape=[-1])),
    "shape of nothing": header(lambda h: first(h, shape=[0])),
    "another dtype": header(lambda h: first(h, dtype="F64")), "unknown dtype": header(lambda h: first(h, dtype="Q4")),
    "integers": header(lambda h: first(h, dtype="I32")), "one name twice": header(twice),
    "no names": header(lambda h: {}), "header is a list": header(lambda h: "[]"),
    "header is deep": header(lambda h: '{"a":' * 20_000), "header of spaces": header(lambda h: " " * 1_000_000),
    "metadata is a list": header(lambda h: {**h, "__metadata__": [1]}),
    **{f"header of {n} bytes": length(n) for n in (0, 1, 10**6, 2**31, 2**60, 2**64 - 1)},
    **{f"index to {place}": index(place) for place in (
        "../model.safetensors", "/etc/passwd", "/dev/zero", "model.safetensors.index.json", "config.json", ".", "",
        "pipe.bin", "device.bin", "loop.safetensors", "a\0b", "..", "model-1.safetensors", "x" * 5000)},
    "index is deep": lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
    "index of lists": lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
    "config is deep": text("config.json", "[" * 100_000), "config is a number": text("config.json", "1e999"),
    "config repeats": text("config.json", '{"model_type": "gpt2", "model_type": "gpt2", "n_layer": 1}'),
    "zip bomb": bin_of(bomb), "laughs": bin_of(laughs), "deep pickle": bin_of(deep),
    "pickle that calls": bin_of(calls(os.system, "touch /tmp/was-executed")),
    "pickle that evaluates": bin_of(calls(eval, "1 + 1")),
    "pickle of a bytearray": bin_of(calls(bytearray, 10**10)),
    "a tensor of 10^12": bin_of(claims((10**6, 10**6), (0, 0))),
    "empty pickle": bin_of(lambda path: path.write_bytes(pickle.dumps({}))),
    "pickle of None": bin_of(lambda path: torch.save(None, path)),
    "names that are no text": bin_of(lambda path: torch.save({1: torch.zeros(2), ("a",): torch.zeros(2)}, path)),
}


def vocabulary(change):
    """A tokenizer.json of a million tokens; `change` breaks one."""
    def write(folder):
        file = folder / "tokenizer.json"
        stated = json.loads(file.read_text())
        vocab = stated["model"]["vocab"]
        vocab |= {f"w{i}": len(vocab) + i for i in range(10**6)}
        change(vocab, stated)
        file.write_text(json.dumps(stated))
    return write


TOKENIZERS = {
    "a million tokens, one negative": vocabulary(lambda v, s: v.update(w5=-1)),
    "a million tokens, one twice": vocabulary(lambda v, s: v.update(w5=v["w6"])),
    "a million tokens, one of text": vocabulary(lambda v, s: v.update(w5="7")),
    "a million tokens, one of 10^18": vocabulary(lambda v, s: v.update(w5=10**18)),
    "merges of tokens that are not there": vocabulary(lambda v, s: s["model"].update(merges=[["x1", "x2"]] * 10)),
    "added token of 10^9": vocabulary(lambda v, s: s.update(added_tokens=[
        {"id": BIG, "content": "<a>", "special": True}])),
    "pattern that backtracks": vocabulary(lambda v, s: s.update(pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False})),
    "tokenizer is deep": text("tokenizer.json", '{"a":' * 100_000),
    "template that loops": text("tokenizer_config.json", json.dumps({"chat_template":
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"})),
    "template that grows": text("tokenizer_config.json", json.dumps({"chat_template":
        "{{ 'aaaaaaaaaa' * 99999999999 }}"})),
    "template that recurses": text("tokenizer_config.json", json.dumps({"chat_template":
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"})),
    "template that reaches out": text("tokenizer_config.json", json.dumps({"chat_template":
        "{{ ''.__class__.__mro__[1].__subclasses__() }}"})),
}
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "os.remove", "os.rename",
             "os.mkdir", "shutil.rmtree")


def attempt(open_it, size: int, seconds: int = SECONDS) -> str:
    """Open a file in a child process: "opened", "refused: ...", or "FAULT: ..." """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        sys.stderr.flush()
        told = "FAULT: nothing was said"
        try:
            taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (taken + size + MEMORY, taken + size + MEMORY))
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))     # a child's pipes need some
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)

            def watch(event, arguments):
                if event in FORBIDDEN or event == "open" and isinstance(arguments[1], str) \
                        and set(arguments[1]) & set("wax+") and isinstance(arguments[0], str) \
                        and "/dev/" not in arguments[0]:
                    os.write(write, f"FAULT: {event} {arguments!r:.200}".encode())
                    os._exit(1)
            sys.addaudithook(watch)
            open_it()
            told = "opened"
        except (ValueError, OSError) as error:
            line = str(error)
            told = f"refused: {line}" if line.strip() and "\n" not in line.strip() and len(line) < 1000 \
                else f"FAULT: not one line: {line!r:.300}"
        except BaseException:
            told = f"FAULT: {traceback.format_exc()[-1500:]}"
        os.write(write, told.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    status = os.waitpid(pid, 0)[1]
    if status & 127 == signal.SIGALRM:
        return f"FAULT: it took {seconds} s"
    return told or f"FAULT: it died, status {status}"
