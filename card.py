"""The model card of a run directory: README.md, as Hugging Face's Hub and its tools read it."""
import contextlib
import json
import math
import re
from pathlib import Path

from published import hub_name, is_classifier
from tokenizer import read_json

OURS = "<!-- Written anew at every save. Take this line out to keep what you change. -->"
NAMES = {"gpt2": "GPT-2", "llama": "Llama 3", "glm": "GLM-4", "glm4": "GLM-4-0414",
         **{f"rwkv{n}": f"RWKV-{n}" for n in (2, 3, 4, 5, 6)}}          # of model_type
TASKS = {"sft": "to answer", "classify": "to label texts", "dpo": "by preferences",
         "grpo": "by rewards"}

TRANSFORMERS = '''\
    from transformers import pipeline

    pipe = pipeline("{kind}", "DIR")
    print(pipe({prompt}))'''
PEFT = '''\
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "DIR")
    tokenizer = AutoTokenizer.from_pretrained("DIR")'''
RWKV = '''\
    from rwkv.model import RWKV

    logits, state = RWKV("DIR/model", strategy="cpu fp32").forward([0], None)       # model.pth'''


def write_card(out: Path) -> None:
    """README.md from what the other files in the directory say; one that was changed stays."""
    file = out / "README.md"
    if file.exists() and OURS not in file.read_text(encoding="utf-8"):
        return
    config, adapter, settings, tokenizer = (read_json(out / f"{name}.json") for name in (
        "config", "adapter_config", "settings", "tokenizer_config"))
    kind, chat = config.get("model_type"), tokenizer.get("chat_format")
    base = settings.get("init_from") or adapter.get("base_model_name_or_path")
    labels, recurrent = is_classifier(out), str(kind).startswith("rwkv")
    tag = "text-classification" if labels else "text-generation"
    metadata = {"library_name": "peft" if adapter else None if recurrent else "transformers",
                "pipeline_tag": tag, "base_model": hub_name(base or ""),
                "tags": json.dumps([kind] if kind else ["lora"])}
    lines = ["---", *(f"{key}: {value}" for key, value in metadata.items() if value), "---", OURS,
             "", f"# {out.resolve().name}", "", what_it_is(out, kind, adapter, settings, base), ""]
    rows = facts(out, config, settings, chat)
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if (out / "loss.png").exists():
        lines += ["", "![loss](loss.png)"]
    lines += ["", "## How to use it", "", "DIR is this folder, or its name on the Hub once it is "
              "there. With the code that made it:", ""]
    lines.append("    python finetune.py --task classify --init-from DIR --predict FILE" if labels
                 else "    python chat.py DIR" + ("" if chat else ' --prompt "Once"'))
    said = '[{"role": "user", "content": "Hello"}]' if chat and not labels else '"Once"'
    if adapter and not labels:
        lines += ["", "With peft, where transformers has the architecture:", "",
                  PEFT.format(base=hub_name(base or "") or "BASE")]
    elif not adapter and not recurrent:
        lines += ["", "With transformers:", "", TRANSFORMERS.format(kind=tag, prompt=said)]
    elif kind in ("rwkv4", "rwkv5", "rwkv6") and not labels:
        lines += ["", "With the package rwkv (a token in, the next one's logits out):", "", RWKV]
    if settings:
        script = "finetune" if settings.get("task") else "train"
        lines += ["", f"`python {script}.py --settings DIR/settings.json` makes it again."]
    file.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def what_it_is(out: Path, kind: str | None, adapter: dict, settings: dict, base) -> str:
    """A sentence: architecture, number of parameters, and from what it was made."""
    name = NAMES.get(kind, kind)
    what = f"A {name}" if kind else f"A LoRA adapter of rank {adapter.get('r')}"
    start = hub_name(base or "") or Path(base or "").name
    came = f", trained from {start}" if start else ", trained from scratch" if settings else ""
    task = TASKS.get(settings.get("task"))
    return f"{what} of {count_parameters(out):,} parameters{came}{f' {task}' if task else ''}."


def count_parameters(out: Path) -> int:
    """How many numbers the files of weights hold."""
    total = 0
    for file in out.glob("*model*.safetensors"):
        from safetensors import safe_open
        with safe_open(file, framework="np") as stored:
            total += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())
    for file in out.glob("model.pth"):
        import torch
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        total += sum(tensor.numel() for tensor in tensors.values())
    return total


def facts(out: Path, config: dict, settings: dict, chat: str | None) -> dict[str, str]:
    """What the table says: data, length of the training, and the measures of these weights."""
    made, rows = measures(out, settings.get("keep")), {}
    if settings:                             # names without folders, which concern nobody else
        rows["data"] = ", ".join(Path(path).name for path in settings.get("data") or ()) or (
            "the source of Python's standard library")
    if (step := made.pop("step", None)) is not None:
        each, what = settings.get("tokens_per_step"), "tokens"
        if not each:
            each, what = settings.get("batch") or 0, "examples"
        rows["training"] = f"{step:,} steps of {each:,} {what}: {step * each:,} {what}"
    if "bits_per_byte" in made:
        rivals = [f"{tool} needs {made.pop(key):.3f}" for key, tool in (
            ("gzip", "gzip -9"), ("xz", "xz -9e")) if key in made]
        rows["bits per byte of held-out text"] = "; ".join(
            [f"{made.pop('bits_per_byte'):.3f}", *rivals])
    rows |= {f"{name} (held out)": f"{value:.4f}" for name, value in made.items()}
    rows |= {"vocabulary": f"{config['vocab_size']:,} tokens"} if "vocab_size" in config else {}
    context = config.get("n_positions") or config.get("max_position_embeddings")
    rows |= {"context": f"{context:,} tokens"} if context else {}
    return rows | ({"chat format": chat} if chat else {})


def measures(out: Path, keep: str | None) -> dict[str, float]:
    """The validation in log.jsonl that the weights in the directory had: the last or the best."""
    events = []
    with contextlib.suppress(FileNotFoundError):
        for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
            event = json.loads(line)
            if "loss" not in event and ("val_loss" in event or "reward" in event):
                events.append(event)
    if not events:
        return {}
    best = events[-1]
    if keep == "best" and "gzip" not in best:           # train.py's last is of these weights
        learnt = [event for event in events if event.get("step")] or events
        best = min(learnt, key=lambda event: event.get("val_loss", -event.get("reward", 0.0)))
    return {name: value for name, value in best.items() if isinstance(value, (int, float))
            and not re.search("second|time", name)}
