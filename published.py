"""Weights of a run directory as other programs want them.

`save_weights` replaces what lies there as a whole, and divides what is large into several files.
`save_head` puts a classifier's head where transformers looks for it, `read_head` finds it again.
"""
import json
import os
import re
import shutil
from pathlib import Path

from torch import Tensor

from tokenizer import read_json, replacing

LIMIT = 5 * 10**9                            # bytes in a file of weights, as in transformers
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "glm": "Glm", "glm4": "Glm4"}      # of transformers


def save_weights(save, out: Path) -> None:
    """Call save(folder), a model's save_pretrained, and move what it wrote to `out`: files of an
    earlier save and of this one are never read together. What is killed leaves out/saving."""
    new = out / "saving"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save(new)
    whole = new / "model.safetensors"
    if whole.exists() and whole.stat().st_size > LIMIT:
        index = write_parts(whole)
        whole.unlink()
        (new / f"{whole.name}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    made = sorted(new.iterdir(), key=lambda file: (file.suffix == ".json", file.name))
    for older in sorted(out.glob("model*.safetensors*"), reverse=True):             # an index first
        if older.suffix == ".json" or older.name not in {file.name for file in made}:
            older.unlink()
    for file in made:                                                               # an index last
        os.replace(file, out / file.name)
    new.rmdir()


def write_parts(file: Path) -> dict:
    """Divide a file of weights into several of at most LIMIT bytes of tensors; their index."""
    from safetensors.torch import load_file, save_file
    parts, size, places = [{}], 0, {}
    tensors = load_file(file)
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if parts[-1] and size > LIMIT:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor
    for n, part in enumerate(parts, 1):
        place = f"model-{n:05}-of-{len(parts):05}.safetensors"
        save_file(part, file.with_name(place), {"format": "pt"})
        shutil.copymode(file, file.with_name(place))                    # safetensors leaves 0600
        places |= dict.fromkeys(part, place)
    total = sum(tensor.nbytes for tensor in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": places}


def hub_name(path: str | Path) -> str | None:
    """OWNER/NAME of a download of huggingface_hub, or of what looks so and is no path here."""
    path = Path(path)
    if found := re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", path.as_posix()):
        return "/".join(found.groups())
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path.as_posix())
    return path.as_posix() if named and not path.exists() else None

# ------------------------------------------------------------------------- the head of a classifier


def is_classifier(folder: Path) -> bool:
    """Whether the checkpoint or adapter in a folder labels texts."""
    stated = read_json(folder / "config.json").get("architectures")
    return (folder / "head.safetensors").exists() or "ForSequenceClassification" in str(stated)


def save_head(folder: Path, labels: list[str], head: dict[str, Tensor], pad: int) -> None:
    """Add a head, {"weight": (K, C)}, to what save_pretrained wrote in a folder.

    transformers' AutoModelForSequenceClassification then gives our logits: `score` of the last
    token that is not `pad`. What it has no place for has a file of its own, head.safetensors: a
    head of an RWKV, of an adapter, and one of earlier versions, which has a bias.
    """
    from safetensors.torch import save
    if (folder / "model.safetensors").exists() and "bias" not in head:
        return write_classifier(folder, labels, head["weight"], pad)
    with replacing(folder / "head.safetensors") as file:
        file.write(save(head, {"format": "pt", "labels": json.dumps(labels)}))


def write_classifier(folder: Path, labels: list[str], weight: Tensor, pad: int) -> None:
    """Make transformers' classifier of the model in a folder. The head for tokens stays."""
    from safetensors.torch import load_file, save_file
    config, file = read_json(folder / "config.json"), folder / "model.safetensors"
    inside = "transformer." if config["model_type"] == "gpt2" else ""   # where GPT-2's body then is
    tensors = {name if name.startswith("lm_head.") else inside + name: tensor
               for name, tensor in load_file(file).items()}
    tensors["score.weight"] = weight.detach().to(next(iter(tensors.values())).dtype).contiguous()
    save_file(tensors, f"{file}.part", {"format": "pt"})
    shutil.copymode(file, f"{file}.part")
    del tensors                                                         # it maps the file
    os.replace(f"{file}.part", file)
    config |= {"architectures": [f"{CLASSES[config['model_type']]}ForSequenceClassification"],
               "problem_type": "single_label_classification", "pad_token_id": pad,
               "id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in
                                                                 enumerate(labels)}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_head(folder: Path) -> tuple[list[str], dict[str, Tensor]] | None:
    """(labels, head) of a classifier that `save_head` or transformers wrote; None: it is none."""
    if not is_classifier(folder):
        return None
    from safetensors import safe_open
    file, name = folder / "head.safetensors", "score.weight"
    if file.exists():
        with safe_open(file, framework="pt") as stored:
            return (json.loads(stored.metadata()["labels"]),
                    {name: stored.get_tensor(name) for name in stored.keys()})
    labels = read_json(folder / "config.json")["id2label"]
    index = read_json(folder / "model.safetensors.index.json").get("weight_map", {})
    with safe_open(folder / index.get(name, "model.safetensors"), framework="pt") as stored:
        head = {"weight": stored.get_tensor(name).float()}
    return [labels[str(n)] for n in range(len(labels))], head
