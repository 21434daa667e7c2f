"""Checkpoints on disk: any published one as a model, and the run directory of a training.

`load_checkpoint` finds out which model a checkpoint is and loads it; all scripts load through it.
The model files let torch, safetensors and json raise what they raise; here it becomes one line.
Then what a run directory holds: what readers open, and resume/resume.pt.
"""
import collections
import contextlib
import dataclasses
import functools
import io
import difflib
import fnmatch
import importlib
import json
import os
import pickle
import re
import reprlib
import struct
import sys
import tempfile
import time
import typing
import zipfile
from pathlib import Path

import numpy as np
import torch

import tokenizer as text
from card import write_card
from hub import locate
from published import save_weights
from tokenizer import read_json

MODELS = {"gpt": ("gpt", "GPT"), "llama3": ("llama3", "Llama3"), "glm4": ("glm4", "GLM4"),
          "rwkv6": ("rwkv6", "RWKV6"),
          **{f"rwkv{n}": (f"lineage.rwkv{n}", f"RWKV{n}") for n in (2, 3, 4, 5)}}
MODEL_TYPES = {"gpt2": "gpt", "llama": "llama3", "chatglm": "glm4", "glm": "glm4", "glm4": "glm4",
               **{f"rwkv{n}": f"rwkv{n}" for n in (2, 3, 4, 5, 6)}}      # of config.json -> ours


def model_parts(name: str):
    """(class, config class, SIZES) of a model by its name in MODELS."""
    module, class_name = MODELS[name]
    module = importlib.import_module(module)
    return getattr(module, class_name), getattr(module, class_name + "Config"), module.SIZES


RWKVS = (                                    # the first whose pattern a name and a shape match
    (r"att\.(k_k|x_r) ", "an RWKV-7"),
    (r"att\.time_maa_rkvw_w1 ", "a variant of RWKV-6, x060b or x060c"),
    (r"att\.gate_w1 ", "a variant of RWKV-6, x060a"),
    (r"\.ffnPre\.", "an RWKV whose first block has ffnPre"),
    (r"\.tiny_|att\.qq\.", "an RWKV with attention beside its time mixing (tiny_ or att.qq)"),
    (r"\.pos_emb_", "an RWKV for images, with pos_emb"),
    (r"\.attention\.time_", "an RWKV in the Hugging Face layout"),
    (r"att\.time_maa_x ", "rwkv6"),
    (r"att\.ln_x\.weight ", "rwkv5"),
    (r"att\.time_mix \(", "rwkv2"),
    (r"att\.time_decay \(\d+, 1\)", "rwkv3"),
    (r"att\.time_decay ", "rwkv4"),
    (r"att\.time_state ", "a tuned state without its model: put its tensors into the model's .pth"),
)


BY_TRANSFORMERS = "AutoModelForCausalLM.from_pretrained(DIR{}).save_pretrained(NEW)"
OTHERS = (                   # pattern of the name, first bytes, what it is, what converts it
    ("lit_model*", b"", "of litgpt", "litgpt convert_from_litgpt DIR NEW"),
    ("*", b"GGUF", "a GGUF file", "transformers: " + BY_TRANSFORMERS.format(", gguf_file=FILE")),
    ("*", b"lmgg", "a ggml file", "llama.cpp's convert_llama_ggml_to_gguf.py, then transformers"),
    ("*", b"tjgg", "a ggml file", "llama.cpp's convert_llama_ggml_to_gguf.py, then transformers"),
    ("*.bin", struct.pack("<i", 20240326), "of llm.c", "its dev/eval/export_hf.py"),
    ("*.bin", struct.pack("<I", 0x616b3432), "of llama2.c", "its export.py --hf, from the .pt"),
    ("*.npz", b"", "of numpy or MLX", "mlx_lm.convert, which writes safetensors"),
    ("model.ckpt*", b"", "of TensorFlow",
     "transformers 4: convert_gpt2_original_tf_checkpoint_to_pytorch.py"),
    ("tf_model*", b"", "of TensorFlow", "transformers 4: "
     + BY_TRANSFORMERS.format(", from_tf=True")),
    ("flax_model*", b"", "of Flax", "transformers 4: "
     + BY_TRANSFORMERS.format(", from_flax=True")),
    ("zero_pp_rank*", b"", "of DeepSpeed's ZeRO", "zero_to_fp32.py, which lies beside it,"),
    ("*.distcp", b"", "of torch.distributed.checkpoint",
     "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE"),
)


def refuse_others(path: Path) -> None:
    """ValueError that names a format which is not read here, and what converts it."""
    ours = ("*.safetensors", "pytorch_model*.bin", "*.pt", "*.pth", "original")
    if path.is_dir() and any(not file.name.startswith(("lit_model", "zero_pp_rank"))
                             for pattern in ours for file in path.glob(pattern)):
        return
    for file in [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*"))):
        with open(file, "rb") as opened:
            begin = opened.read(4)
        for pattern, magic, what, tool in OTHERS:
            if begin.startswith(magic) and fnmatch.fnmatch(file.name, pattern):
                raise ValueError(f"{file} is {what}, which is not read here: {tool} converts it")


def refuse_quantised(folder: Path, stated: dict) -> None:
    """ValueError for weights of few bits (GPTQ, AWQ, bitsandbytes, FP8, MLX), by the configs."""
    for file, name in (("config.json", "quantization_config"), ("config.json", "quantization"),
                       ("quantize_config.json", "bits"), ("quant_config.json", "w_bit")):
        found = (stated if file == "config.json" else read_json(folder / file)).get(name)
        if found is not None:
            method = found.get("quant_method", "MLX" if name == "quantization" else "") \
                if isinstance(found, dict) else f"{found} bits"
            raise ValueError(f"{folder}/{file} has {name}: quantised weights ({method}) are not "
                             "read here; take the model that they were made of"
                             + (", or mlx_lm.convert --dequantize" if method == "MLX" else
                                ", or where transformers can, its model.dequantize()"))


def identify_rwkv(path: Path) -> str:
    """Which RWKV a .pth holds, or the one in a folder: names and shapes of its tensors tell."""
    files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
    if len(files) > 1:
        raise ValueError(f"{path} holds several models, {', '.join(file.name for file in files)}: "
                         "give the path of one")
    if not files:
        raise FileNotFoundError(f"{path} has no config.json that names a model of ours, nor a .pth")
    tensors = innermost(read_pickle(files[0]))
    lines = [f"{name} {tuple(getattr(tensor, 'shape', ()))}" for name, tensor in tensors.items()]
    found = next((what for pattern, what in RWKVS
                  if any(re.search(pattern, line) for line in lines)),
                 f"no RWKV, no model of ours: it holds {', '.join(lines[:3])}")
    if found not in ("rwkv2", "rwkv3") and "head_q.weight" in tensors:
        found = "an RWKV with headQK, which is known of RWKV-2 and RWKV-3 only"
    if found not in MODELS:
        raise ValueError(f"{path} is {found}; RWKV-2 to RWKV-6 are supported")
    return found


def is_rwkv(path: Path) -> bool:
    """Whether a .pth holds an official RWKV, whatever the config.json beside it is about."""
    names = innermost(read_pickle(path))
    return any(".att." in name or name == "emb.weight" for name in names)


def identify(path: Path) -> str:
    """Which of our models a checkpoint is: its config tells, or the names of its tensors."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise ValueError(f"{path} is an adapter: python finetune.py --merge --init-from {path} "
                         "--out NEW makes a checkpoint of it")
    refuse_others(path)
    folder = path if path.is_dir() else path.parent
    nanogpt = path / "ckpt.pt" if path.is_dir() else path
    beside = [*path.glob("model*.safetensors"), *path.glob("pytorch_model*.bin")]
    for name in ("ckpt.pt", "consolidated.00.pth"):
        if beside and (path / name).exists():
            raise ValueError(f"{path} holds {name} and {beside[0].name}: give the path of one")
    if nanogpt.suffix == ".pt" and nanogpt.exists() and "model_args" in read_pickle(nanogpt):
        return "gpt"
    places = [folder / place for place in ("", "original", "original/mp8", "original/mp16")]
    if not (folder / "config.json").exists() and (path.is_dir() or "consolidated" in path.name) \
            and any((place / name).exists() for place in places
                    for name in ("params.json", "consolidated.00.pth")):
        return "llama3"
    stated = None
    if (folder / "config.json").exists() and not (path.suffix == ".pth" and is_rwkv(path)):
        config = read_json(folder / "config.json")
        refuse_quantised(folder, config)
        stated = config.get("model_type")
        if stated not in MODEL_TYPES:
            raise ValueError(f"{folder}/config.json is of model_type {stated!r}, none of "
                             + ", ".join(MODEL_TYPES))
        if not stated.startswith("rwkv"):
            return MODEL_TYPES[stated]
    found = identify_rwkv(path)
    if stated not in (None, found):
        raise ValueError(f"{path} is {found}, but its config.json has model_type {stated!r}")
    return found


def refuse_lies(path: Path) -> None:
    """ValueError for files that claim far more than they hold, before anything is allocated: sizes
    in a config, tensors in a pickle, what a zip unpacks to; and for what is no file at all, as a
    pipe, which would be read for ever."""
    folder, kinds = path if path.is_dir() else path.parent, (".safetensors", ".bin", ".pt", ".pth")
    files = [file for place in (folder, folder / "original") for file in place.glob("*")
             if file.suffix in kinds]
    files = [path] if path.is_file() else files
    for file in files:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file} is a device or a pipe, not a file of weights")
    held = sum(file.stat().st_size for file in files if file.exists())
    for file in files:
        if file.suffix != ".safetensors" and file.exists():
            refuse_bomb(file)
    stated = [read_json(folder / name) for name in ("config.json", "params.json")]
    nanogpt = path / "ckpt.pt" if path.is_dir() else path
    if nanogpt.suffix == ".pt" and zipfile.is_zipfile(nanogpt):
        stated.append(read_pickle(nanogpt).get("model_args"))
    for name, value in (pair for found in stated if isinstance(found, dict) for pair in found.items()):
        layer = re.search("layer", name)     # each takes some 400 bytes of names alone
        most = 1000 + held // 400 if layer else 10**6 + held
        if (layer or re.search("hidden|embd|inner|ffn|intermediate|heads?|dim|channels|group", name)) \
                and type(value) is int and value > most and held:
            raise ValueError(f"{folder} states {name} {value:,}, but its weights have {held:,} bytes")


def refuse_bomb(file: Path) -> None:
    """ValueError for a file of torch.save that takes far more memory than it has bytes."""
    if not zipfile.is_zipfile(file):         # older than torch 1.6
        return
    with zipfile.ZipFile(file) as content:   # torch.save packs, it does not compress
        members = content.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > 10**6 + 4 * file.stat().st_size:
            raise ValueError(f"{file} would unpack to {unpacked:,} bytes: torch.save did not "
                             "write it")
        for member in members:
            if member.filename.endswith("data.pkl") and b"\nbytearray\n" in content.read(member):
                raise ValueError(f"{file} asks for a bytearray, whose size cannot be checked: "
                                 "save the weights alone, torch.save(model.state_dict(), FILE)")


def load_checkpoint(path: str | Path, device: str = "cpu", dtype=None, **overrides):
    """The model in a checkpoint, whichever of ours it is: a folder, a file or a name (hub.py).

    overrides: config fields that the file states wrongly. Whatever is wrong with the checkpoint is
    a ValueError or OSError of one line; running out of memory passes.
    """
    path = locate(path)
    with readable(path):
        refuse_lies(path)
        name = identify(path)
    with readable(path, re.sub(r"(RWKV)", r"\1-", MODELS[name][1])), numpy_values():
        model_class, config_class, _ = model_parts(name)
        file = path / "config.json" if path.is_dir() else path.with_name("config.json")
        stated = read_json(file)                                        # null: not stated
        check_fields(config_class, {field: value for field, value in stated.items()
                                    if value is not None}, file)
        unknown = set(overrides) - {spec.name for spec in dataclasses.fields(config_class)}
        if unknown:
            raise ValueError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}")
        check_fields(config_class, overrides, config_class.__name__)
        model = model_class.from_pretrained(path, device, dtype, **overrides)
    if not name.startswith("rwkv"):          # RWKV has fp32 parameters in bf16 files by design
        unite_dtypes(model, path, str(stated.get("dtype") or stated.get("torch_dtype")))
    return model


def unite_dtypes(model: torch.nn.Module, path: Path, stated: str) -> None:
    """All parameters in one dtype, if they have several, and say so: in the one that config.json
    states, as transformers does, else in the one that most weights have."""
    sizes = collections.Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel()
    if any(dtype.itemsize == 1 for dtype in sizes):
        raise ValueError(f"{path} holds weights of 8 bits ({', '.join(map(str, sizes))}): "
                         "quantised weights are not read here")
    if len(sizes) > 1:
        dtype = getattr(torch, stated.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            dtype = max(sizes, key=sizes.get)
        model.to(dtype)                      # one parameter at a time: one copy in memory
        stored = ", ".join(f"{size:,} {kind}" for kind, size in sizes.most_common())
        print(f"{path} holds weights of several dtypes ({stored}): all became {dtype}".replace(
            "torch.", ""), file=sys.stderr)


class NumpyDtype:
    """Stands for numpy's dtype while a pickle is read: a code like f8, and a byte order."""

    def __init__(self, code: str, *_):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple):
        self.order = ">" if state[1] == ">" else "="


class NumpyArray:
    """Stands for an array beside the weights, such as the state of a generator: it is not kept."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state: tuple):
        pass


def numpy_number(dtype: NumpyDtype, data: bytes):
    """The Python number that a pickled scalar of numpy is; None for what is no number."""
    if re.fullmatch(r"b1|[iuf][1248]", dtype.code):
        return np.frombuffer(data, dtype.order + dtype.code)[0].item()


def numpy_values():
    """Lets torch.load read files with numpy's scalars in them (losses, rates); none of numpy's
    own code runs on what the file says."""
    names = {"dtype": NumpyDtype, "ndarray": NumpyArray}
    for core in ("core", "_core"):
        names |= {f"{core}.multiarray.scalar": numpy_number,
                  f"{core}.multiarray._reconstruct": NumpyArray}
    return torch.serialization.safe_globals(
        [(stands_for, f"numpy.{name}") for name, stands_for in names.items()])


@contextlib.contextmanager
def readable(path: Path, kind: str = ""):
    """Turns what reading a damaged or foreign file raises into one line; the cause is chained.

    It translates the exceptions that torch.load, safetensors, json and our loaders are known to
    raise for such files, and no others: a fault of ours should not read as a damaged file.
    """
    damage = [OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
              ArithmeticError, AssertionError, re.error, pickle.UnpicklingError, struct.error,
              zipfile.BadZipFile]
    with contextlib.suppress(ImportError):
        from safetensors import SafetensorError
        damage.append(SafetensorError)
    try:
        yield
    except tuple(damage) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        reason = re.sub(r"\x1b\[[\d;]*m", "", " ".join(str(error).split()))
        foreign = re.search(r"GLOBAL (\S+) (was not an allowed|whose module)", reason)
        reason = re.sub(r"Weights only load failed.*?(error: |$)|(In PyTorch 2.6|Please file).*",
                        "", reason)[:300]                               # torch's advice
        pointers = [file for file in ([path] if path.is_file() else sorted(path.glob("*.*")))
                    if is_pointer(file)]
        if pointers:
            reason = f"{pointers[0]} is a pointer to the weights: run `git lfs pull` to get them"
        elif foreign and foreign[1].rpartition(".")[2][:1].isupper():
            reason = (f"{path} holds an object of the class {foreign[1]}, and nothing in a file is "
                      "executed here: where it was made, save the weights alone, "
                      "torch.save(model.state_dict(), FILE)")
        elif foreign:
            reason = (f"{path} is damaged, or no file of tensors: it would call {foreign[1]}, and "
                      "nothing in a file is executed here")
        elif isinstance(error, OSError) and error.filename:
            reason = f"{error.filename}: {error.strerror}"
        elif "can require gradients" in reason:
            reason = f"{path} holds weights that are integers: quantised weights are not read here"
        elif "loading state_dict" in reason:
            reason = f"{path} does not fit its config: {reason}"
        elif type(error) is KeyError:
            reason = f"{path}{kind and f', taken for {kind},'} lacks {reason}"
        elif isinstance(error, (TypeError, AttributeError, ArithmeticError)):
            reason = f"{path} states what does not fit ({type(error).__name__}: {reason})"
        elif type(error) not in (ValueError, FileNotFoundError):
            reason = f"{path} is damaged, or no file of tensors ({type(error).__name__}: {reason})"
        elif str(path) not in reason:
            reason = f"{path}: {reason}"
        held = [file.name for file in sorted(path.glob("*")) if file.suffix in
                (".safetensors", ".bin", ".pt", ".pth", ".ckpt")]
        if isinstance(error, FileNotFoundError) and held and "the folder holds" not in reason:
            reason += (f"; the folder holds {', '.join(held[:6])}: give the path of the file with "
                       "the weights, or put the index of parts beside them")
        kind = type(error) if type(error) is FileNotFoundError else ValueError
        raise kind(reason[:900]) from error


def is_pointer(path: Path) -> bool:
    """Whether git-lfs left a pointer where the file should be."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(9) == b"version h"


def check_fields(config_class: type, values: dict, where) -> None:
    """ValueError that names the first value which its config field cannot hold."""
    types = typing.get_type_hints(config_class)
    for name, value in values.items():
        kinds = typing.get_args(types.get(name)) or (types.get(name),)
        kinds = {typing.get_origin(kind) or kind for kind in kinds}     # list[int]: list
        fits = type(value) in kinds or (float in kinds and type(value) is int)
        if name in types and not fits:
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, but it takes {wanted}")


def eos_tokens(config) -> list[int]:
    """The config's eos_token_id, which may be an int, a list or None, as a list."""
    stated = config.eos_token_id
    return stated if isinstance(stated, list) else [] if stated is None else [stated]


def config_values(config_class: type, assignments: list[str]) -> dict:
    """--config field=value ...: each value is read as JSON where it is some, else as text."""
    known, values = {spec.name for spec in dataclasses.fields(config_class)}, {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--config takes field=value, not {assignment!r}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"--config {assignment}: {config_class.__name__} has no field {name}"
                             + (f", but {near[0]}" if near else ""))
        try:
            value = json.loads(value)
        except ValueError:
            pass
        values[name] = value
    check_fields(config_class, values, "--config")
    return values


OWN = {50_277: (50_277, "20B_tokenizer.json"),              # RWKV's embedding -> its vocabulary:
       65_536: (65_409, "rwkv_vocab_v20230424.txt")}        # (the fewest tokens, the file)


def check_vocabulary(config, tokenizer) -> None:
    """ValueError if the tokenizer is another model's.

    Tokens that were added to it, as "[PAD]", may lie beyond the model; the tokenizer then refuses
    to encode these.
    """
    rwkv = "RWKV" in type(config).__name__
    least, file = OWN.get(config.vocab_size, (0, "")) if rwkv else (0, "")
    if tokenizer.vocab_size < least:
        raise ValueError(f"the model has {config.vocab_size} ids, the tokenizer "
                         f"{tokenizer.vocab_size}: it needs its own tokenizer, {file}")
    beyond = [id for id in (*tokenizer.prefix_ids, tokenizer.end_id)
              if id is not None and id >= config.vocab_size]
    if tokenizer.text_size > config.vocab_size or beyond:
        raise ValueError(f"the model has {config.vocab_size} ids, the tokenizer "
                         f"{tokenizer.vocab_size}: it needs its own tokenizer")
    if tokenizer.vocab_size > config.vocab_size:
        tokenizer.model_size = config.vocab_size


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a RuntimeError of torch means that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) \
        or "out of memory" in str(error)


def read_pickle(path: Path) -> dict:
    """The dict in a file of torch.save, mapped into memory; nothing in it is executed."""
    with readable(path), numpy_values():
        refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))             # no zip before torch 1.6
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
        return content


def innermost(content: dict) -> dict:
    """The dict of tensors inside the dicts that trainers put around it."""
    around = ("model", "state_dict", "model_state_dict", "module")
    while inner := next((content[key] for key in around if isinstance(content.get(key), dict)), 0):
        content = inner
    return content


def write_text(path: Path, content: str) -> None:
    """Replace a text file as a whole."""
    with text.replacing(path) as file:
        file.write(content.encode())


# ----------------------------------------------------------------------------------- run directory


def make_run_directory(out: str | None, name: str) -> Path:
    """A new directory: the one asked for, if it holds nothing, or the next free out/NAME-N."""
    if out is not None:
        path = Path(out)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"--out {path} is not empty: --resume {path} goes on with a run, "
                             "another --out starts one")
        path.mkdir(parents=True, exist_ok=True)
        return path
    for n in range(1, 10**6):
        with contextlib.suppress(FileExistsError):
            path = Path("out", name if n == 1 else f"{name}-{n}")
            path.mkdir(parents=True)
            return path


def publish(model, tokenizer, settings, out: Path) -> None:
    """Write what others open: weights in the published layout, tokenizer, settings, a card."""
    save_weights(model.save_pretrained, out)
    tokenizer.save(out, model_max_length=model.config.context)
    write_text(out / "generation_config.json", json.dumps(
        {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id,
         "pad_token_id": tokenizer.pad_id, "do_sample": True, "temperature": 0.8},
        indent=2) + "\n")
    write_settings(settings, out)
    write_card(out)


def write_settings(settings, out: Path) -> None:
    """settings.json: what `--settings FILE` repeats."""
    values = {name: value for name, value in dataclasses.asdict(settings).items()
              if name not in ("out", "resume", "settings")}
    write_text(out / "settings.json", json.dumps(values, indent=2) + "\n")


def save_resume(folder: Path, settings, run, tokenizer, key: str, config,
                **state) -> None:
    """Replace resume.pt, complete in itself (but for shards, which lie beside it): a kill leaves
    the old one or the new one."""
    files = {name: data.decode("latin-1") for name, data in tokenizer.saved_files().items()}
    path = folder / "resume.pt"
    folder.mkdir(exist_ok=True)
    torch.save({**state, "settings": dataclasses.asdict(settings), "tokenizer": files, "data": key,
                "config": dataclasses.asdict(config), "chat_format": tokenizer.chat_format,
                "world": run.world, "spent": time.time() - run.started}, f"{path}.part")
    os.replace(f"{path}.part", path)


def saved_shards(out: Path) -> list[Path]:
    """Complete folders of cluster.saving in a run directory, the latest last."""
    found = (out / "resume").glob("step-*")
    steps = {int(path.name[5:]): path for path in found if path.name[5:].isdecimal()}
    return [steps[step] for step in sorted(steps)]


def load_resume(asked: str) -> tuple[Path, dict]:
    """(run directory, what save_resume wrote there); ValueError or OSError of one line."""
    out = Path(asked)
    if out.is_file():                        # resume.pt itself
        out = out.parent.parent if out.parent.name.startswith("step-") else out.parent
        out = out.parent if out.name == "resume" else out
    files = (*(folder / "resume.pt" for folder in saved_shards(out)[-1:]),
             out / "resume" / "resume.pt", out / "resume.pt")           # the last: older runs
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise FileNotFoundError(f"--resume {out}: no resume/resume.pt there, nothing was saved yet")
    saved = read_pickle(found) | {"folder": str(found.parent)}
    if "eos_token_id" not in saved.get("config", {}) or "keep" not in saved.get("settings", {}):
        raise ValueError(f"{found} was written by an earlier version, whose optimiser or schedule "
                         f"was another: train on from its weights with --init-from {out}")
    return out, saved


# These change the last bits of a run, not its recipe. (Other data are noticed by their contents.)
ROUNDING = {"micro_batch", "checkpoint_activations", "device", "dtype", "compile"}


def resume_settings(kind: type, saved: dict, asked, given: set[str], out: Path,
                    harmless: set[str]):
    """(the run's own settings, with what was given beside --resume; what of that is not exact).

    ValueError for what would change the recipe.
    """
    settings, changed = kind(**saved["settings"]), []
    if "steps" in given and settings.steps and asked.steps > settings.steps == saved["step"]:
        raise ValueError(f"--steps {asked.steps} would change the result: {out} is finished and "
                         "its learning rate has fallen; to train on from its weights: --init-from "
                         f"{out} --steps {asked.steps - settings.steps}")
    for name in sorted(given - {"resume"}):
        value, before = getattr(asked, name), getattr(settings, name)
        if name in ROUNDING and value != before:
            changed.append(f"--{name.replace('_', '-')} {value} instead of {before}")
        elif name not in harmless | {"data", "val"} and value != before:
            raise ValueError(f"--{name.replace('_', '-')} {value} would change the result: {out} "
                             f"was started with {before}")
        setattr(settings, name, value)
    settings.resume, settings.out = str(out), str(out)
    return settings, changed


def saved_tokenizer(saved: dict):
    """The tokenizer inside a resume.pt."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in saved["tokenizer"].items():
            Path(folder, name).write_bytes(content.encode("latin-1"))
        tokenizer = text.load_tokenizer(folder)
    tokenizer.chat_format = saved["chat_format"]
    return tokenizer


def measured(out: Path, name: str) -> dict[int, float]:
    """step -> value of one measure in log.jsonl; of a repeated step, the last."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {event["step"]: event[name] for event in map(json.loads, lines) if name in event}


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib is there; then it is made ready, to draw without a screen."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.figure().savefig(io.BytesIO())    # the first picture takes seconds
    pyplot.close()
    return True


def draw_log(out: Path) -> None:
    """loss.png of what log.jsonl has, where matplotlib is installed: the loss of each step as a
    band, its mean over a thirtieth of the run, validation; in bits per byte what compressors need.
    """
    if not can_draw():
        return
    from matplotlib import pyplot
    train, val = measured(out, "loss"), measured(out, "val_loss")
    others = {name: found for name in ("accuracy", "reward") if (found := measured(out, name))}
    figure, panels = pyplot.subplots(1 + len(others), figsize=(7, 4 + 2 * len(others)), sharex=True,
                                     squeeze=False, layout="constrained")
    axes, *more = panels[:, 0]
    steps, losses = list(train), list(train.values())
    half = len(losses) // 60
    means = [np.mean(losses[max(0, i - half):i + half + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="C0", lw=0.6, alpha=0.3)
    axes.plot(steps, means, color="C0", label="training")
    if val:
        axes.plot(list(val), list(val.values()), "o-", color="C1", label="validation")
    if bits := measured(out, "bits_per_byte"):
        ratio = np.mean([bits[step] / val[step] for step in bits])      # of a byte to a token
        axes.secondary_yaxis("right", (lambda nats: nats * ratio, lambda bits: bits / ratio)
                             ).set_ylabel("bits per byte")
        for style, name in ((":", "gzip"), ("--", "xz")):
            for needs in [*measured(out, name).values()][-1:]:
                axes.axhline(needs / ratio, color="gray", ls=style, label=f"{name}: {needs:.2f}")
    axes.set(ylabel="loss (nats a token)", title=out.name)
    axes.legend()
    for panel, (name, found) in zip(more, others.items()):
        panel.plot(list(found), list(found.values()), "o-", color="C1")
        panel.set(ylabel=f"validation: {name}")
    panels[-1, 0].set(xlabel="step")
    with text.replacing(out / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)


def curve(losses: list[float], columns: int = 72, rows: int = 8) -> str:
    """The losses as a curve of characters, for a terminal without pictures."""
    losses = [loss for loss in losses if np.isfinite(loss)] or [0.0]
    means = [piece.mean() for piece in np.array_split(losses, min(columns, len(losses)))]
    low, high = min(means), max(means)
    level = [round((mean - low) / max(high - low, 1e-9) * (rows - 1)) for mean in means]
    lines = ["".join("*" if at == row else " " for at in level) for row in reversed(range(rows))]
    marks = [f"{high:8.3f}", *[" " * 8] * (rows - 2), f"{low:8.3f}"]
    return "\n".join(f"{mark} |{line}" for mark, line in zip(marks, lines))


