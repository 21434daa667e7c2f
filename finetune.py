"""Fine-tune any model of this project: on answers, labels, preferences or rewards.

    python finetune.py --task sft      --init-from out/gpt     learn to answer
    python finetune.py --task classify --init-from out/gpt     learn to label texts
    python finetune.py --task dpo      --init-from out/gpt     learn which of two answers is better
    python finetune.py --task grpo     --init-from out/gpt     learn what earns a reward

Each has data of its own, read from the source of Python's standard library: what a function does,
which package a docstring comes from, whose docstring it is, function headers to complete. Your own,
--data FILE, have rows in one of the shapes that rows.py lists: conversations or questions and
answers (sft), a text and its label (classify; then --predict FILE), a prompt with a chosen and a
rejected answer (dpo), a prompt (grpo, with --reward FILE.py that has reward(prompt, completion)).

--lora RANK trains two small matrices beside each large one, and keeps only them: an adapter, which
peft opens for the models that transformers knows. What comes out is a run directory for chat.py.

From the top: settings; the four losses; sequences and batches; the four tasks; loading; `finetune`,
with the loop. Adapters are in lora.py, rows and rewards in rows.py. To change the data, see
`Batches`; a loss, its task's `forward`; optimiser and schedule are train.py's.

References: Hu et al. 2021, "LoRA"; Rafailov et al. 2023, "Direct Preference Optimization"; Shao et
al. 2024, "DeepSeekMath" (GRPO); Yu et al. 2025, "DAPO" (the mean over tokens, not over sequences).
"""
import contextlib
import copy
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cluster
import tokenizer as text
import train
from card import write_card
from checkpoints import (check_vocabulary, config_values, draw_log, eos_tokens, identify,
                         load_checkpoint, load_resume, make_run_directory, model_parts,
                         publish, readable, resume_settings, save_resume, saved_tokenizer)
from hub import locate
from lora import adapter_folder, add_lora, find_base, load_adapter, merged, save_adapter
from published import read_head, save_head, save_weights
from rows import (EMPTY, Notices, RewardError, all_labels, chat_parts, content_of, conversation,
                  ending, excluded, header_rows, label_key, label_of, label_rows, load_reward,
                  naming, preference_rows, question_rows, read_rows, score_code, shown, split,
                  string)
from train import Run, flag

# ----------------------------------------------------------------------------------------- settings


@dataclasses.dataclass
class Settings(train.Common):
    """Settings of finetune.py. task, needs: the --task and the flag that a flag requires."""
    data: list[str] = flag([], "files of examples (without: made from Python's standard library)")
    columns: list[str] = flag([], "OURS=THEIRS: names of columns, as label=v1 text=v2")
    tokenizer: str | None = flag(None, "folder, file or name (the checkpoint's)")
    context: int | None = flag(None, "longest example, in tokens; the rest is cut off (1024, or "
                               "the model's)", "block_size", low=16)
    out: str | None = flag(None, "the run directory (out/MODEL-TASK, then out/MODEL-TASK-2, ...)")
    base: str | None = flag(None, "where the base of an adapter in --init-from is, if it moved",
                            needs="init_from")
    epochs: float | None = flag(None, "instead of --steps: passes over the data (by task)", above=0)
    lr: float | None = flag(None, "peak learning rate (by task and width)", "learning_rate",
                            above=0)
    weight_decay: float = flag(0.0, "decay of the matrices", low=0)
    compile: str = flag("off", "compile the loss", choices=("auto", "on", "off"))
    task: str | None = flag(None, "what is learned", choices=("sft", "classify", "dpo", "grpo"))
    hold_out: float = flag(0.1, "fraction of the data to validate on", above=0, high=0.5)
    chat: str | None = flag(None, "chat format, or none: plain text (the tokenizer's own, else "
                            "alpaca)", choices=("none", *text.CHAT_FORMATS))
    batch: int | None = flag(None, "examples in a step (16; grpo: 8 prompts)", "batch_size", low=1)
    eval_examples: int = flag(256, "held-out examples of a validation", low=1)
    samples: int = flag(2, "how many samples to show", low=0)
    max_new_tokens: int = flag(64, "longest completion of grpo, and of samples", low=1)
    lora: int | None = flag(None, "train an adapter of this rank instead of the matrices", low=1)
    lora_alpha: float | None = flag(None, "its strength (twice the rank)", needs="lora", above=0)
    base_dtype: str | None = flag(None, "what the frozen weights are kept in, to save memory; "
                                  "computed in bfloat16 (fp32)", needs="lora",
                                  choices=("bfloat16", "int8", "int4"))
    lora_targets: str = flag(r"\.\d+\.", "layers that get one, a regular expression; every block's",
                             needs="lora")
    merge: bool = flag(False, "write merged weights, no adapter; without --task: only that")
    all_tokens: bool = flag(False, "learn the prompts as well as the replies", task="sft")
    tune: str = flag("all", "train all blocks or the last one", choices=("last", "all"),
                     task="classify")
    balance: bool = flag(False, "drop examples until all labels have as many", task="classify")
    predict: str | None = flag(None, "label the texts of this file, and stop", task="classify")
    beta: float = flag(0.1, "DPO's beta, as in the paper", task="dpo", above=0)
    label_smoothing: float = flag(0.0, "fraction of wrong preferences", task="dpo", low=0, high=0.5)
    reward: str | None = flag(None, "EXECUTED file with reward(prompt, completion)", task="grpo")
    group: int = flag(8, "completions of each prompt", task="grpo", low=2)
    temperature: float = flag(0.8, "of sampling", task="grpo", above=0)
    updates: int = flag(2, "steps on the same completions", task="grpo", low=1)
    clip_ratio: float = flag(0.2, "PPO's clipping range of the ratio", task="grpo", above=0)
    kl: float = flag(0.05, "weight of the divergence from the start", task="grpo", low=0)

# ---------------------------------------------------------------------------------- the four losses


def sft_loss(log_probs: Tensor) -> Tensor:
    """Supervised fine-tuning: -log p of each token of the replies. (B, T) -> (B, T)."""
    return -log_probs


def classify_loss(logits: Tensor, label: Tensor) -> Tensor:
    """-log p of the right one of K labels. logits (B, K), label (B,) -> (B,)."""
    return F.cross_entropy(logits, label, reduction="none")


def dpo_loss(margin: Tensor, smoothing: float) -> Tensor:
    """Direct preference optimisation: -log sigmoid(margin) of each pair. (b,) -> (b,).

    margin: beta times how much log p(chosen) - log p(rejected) has grown since the start. With
    smoothing, that fraction of the preferences is taken to be the other way.
    """
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def grpo_loss(new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, clip: float,
              kl: float) -> Tensor:
    """Group relative policy optimisation: the clipped objective of each token, negated, plus kl
    times its divergence from the start. (B, T) -> (B, T).

    new, old, reference (B, T): log-probabilities by the model that learns, by the one that drew the
    tokens, by the start; advantage (B, 1). The divergence is estimated by r - 1 - log r >= 0, where
    r is the ratio of the start's probability to the new one.
    """
    ratio, gap = (new - old).exp(), reference - new
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return kl * (gap.exp() - 1 - gap) - gain


def advantages(rewards: list[float]) -> list[float]:
    """How much better each of a group is than the group, in its standard deviations."""
    r = torch.tensor(rewards, dtype=torch.float64)
    return ((r - r.mean()) / (r.std(correction=0) + 1e-4)).tolist()


def log_probs(model, batch: dict, temperature: float = 1.0, penalty: float = 0.0) -> Tensor:
    """(B, T) fp32: the log-probability of each target, 0 where there is none."""
    learned = batch["targets"] != -100                                  # no logits for the prompts
    hidden, targets = model.hidden(batch["tokens"])[learned], batch["targets"][learned]   # (N, C)
    losses = train.token_losses(model, hidden, targets, temperature, penalty)           # (N,)
    return torch.zeros(learned.shape, device=losses.device).masked_scatter(learned, -losses)

# ---------------------------------------------------------------------------- sequences and batches


def sequence(tokenizer, messages, limit: int, everything=False, notices: Notices | None = None):
    """(inputs, targets) of a conversation, at most `limit` tokens each; -100 is no target.

    Only replies are learned, or everything, but for replies of weight 0. A reply that is cut still
    ends, and is counted. None: cutting leaves no reply to learn.
    """
    notices = Notices() if notices is None else notices
    parts, end = chat_parts(tokenizer, messages), ending(tokenizer)
    weights = iter([m.get("weight", 1) for m in messages if m["role"] == "assistant"])
    if not everything and any(m.get("weight") for m in messages if m["role"] != "assistant"):
        raise ValueError("a message that is no reply has weight 1: --all-tokens learns all of them")
    ids, reply, learn, cut = [], [], [], 0
    for part, is_reply in parts:
        ids += part
        reply += [is_reply] * len(part)
        learn += [next(weights) if is_reply else everything] * len(part)
        cut += is_reply and len(ids) > limit + 1
    if len(ids) > limit + 1:
        within = reply[limit] and reply[limit + 1]                      # in the middle of a reply
        ids, reply = ids[:limit + 1], reply[:limit + 1]
        if within and all(reply[-len(end) - 1:]):                       # more than the end is left
            ids[-len(end):] = end
        while reply and not (all(reply[-len(end):]) and ids[-len(end):] == end):
            ids, reply = ids[:-1], reply[:-1]                           # questions without answer
    if not any(both[0] and both[1] for both in zip(reply[1:], learn[1:])):
        return None
    notices["replies"] += sum(is_reply for _, is_reply in parts)
    notices[f"replies are cut at --context {limit}"] += cut
    return ids[:-1], [id if learnt else -100 for id, learnt in zip(ids[1:], learn[1:])]


def length(example: dict) -> int:
    """Tokens of its longest sequence."""
    return max(len(inputs) for inputs, _ in example["rows"])


def groups(examples: list[dict], budget: int):
    """Yield lists of examples of similar length: at most `budget` tokens each, padding included.

    For a small model one more batch costs about as much as 128 tokens of padding.
    """
    group = []
    for example in sorted(examples, key=length):
        rows, T = len(example["rows"]), length(example)
        if group and ((len(group) + 1) * rows * T > budget
                      or len(group) * rows * (T - length(group[-1])) > 128):
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def collate(examples: list[dict], context: int) -> dict[str, Tensor]:
    """One batch: "tokens", "targets" (B, T) and "length" (B,) of all rows; their numbers, (b,).

    A row holds one sequence, then padding, which is no target. As no architecture looks to the
    right, nothing leaks from one example into another: not by attention, not by a state. T is a
    multiple of 16, if the context allows: for each new shape, kernels must be found or compiled.
    """
    rows = [row for example in examples for row in example["rows"]]
    longest = max(map(length, examples))
    T = max(longest, min(-(-longest // 16) * 16, context))
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    targets = torch.full_like(tokens, -100)
    for i, (inputs, wanted) in enumerate(rows):
        tokens[i, :len(inputs)] = torch.tensor(inputs)
        targets[i, :len(inputs)] = torch.tensor(wanted)
    numbers = {name: torch.tensor([example[name] for example in examples])
               for name, value in examples[0].items() if isinstance(value, (int, float))}
    lengths = torch.tensor([len(inputs) for inputs, _ in rows])
    return {"tokens": tokens, "targets": targets, "length": lengths, **numbers}


class Batches(train.Batches):
    """Examples for each step: all of them once an epoch, in a new order each time (`place`)."""

    def __init__(self, examples: list[dict], settings: Settings, run: Run):
        self.examples, self.count, self.seed, self.run = examples, len(examples), settings.seed, run
        self.batch, self.context = settings.batch, settings.context
        self.budget = settings.micro_batch * settings.context
        self.epoch, self.order = -1, None

    def chosen(self, step: int) -> list[dict]:
        """The examples of a step that are this process's."""
        return [self.examples[self.place(step * self.batch + k)]
                for k in range(self.run.rank, self.batch, self.run.world)]

    def __call__(self, step: int) -> list[dict[str, Tensor]]:
        """This process's micro-batches of a step."""
        return [collate(group, self.context) for group in groups(self.chosen(step), self.budget)]

# ----------------------------------------------------------------------------------- the four tasks


class Task(nn.Module):
    """A model and its loss: forward(batch) gives (sum, number of targets), so that DDP, FSDP and
    torch.compile can wrap it. Each of the four has, too, example(row): {"rows": [(inputs, targets),
    ...]} and what else the loss needs, or None where nothing is to be learnt; measures(examples):
    {name: value}; sample(examples): a text. kept: what a resumed run needs beside the weights."""
    unit = "tokens"                          # what its targets are

    def __init__(self, settings: Settings, run: Run, tokenizer, model, kept: dict):
        super().__init__()
        self.settings, self.run, self.tokenizer, self.kept = settings, run, tokenizer, kept
        self.model, self.config, self.OPTIMIZER = model, model.config, model.OPTIMIZER
        self.stop = {*tokenizer.stop_ids, *eos_tokens(model.config)}
        self.notices = Notices()

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """The model's; a head of the task does not decay."""
        head = [p for name, p in self.named_parameters() if name.startswith("head.")]
        return [*self.model.parameter_groups(weight_decay),
                dict(params=head, weight_decay=0.0, lr_scale=1.0, hidden_matrix=False)]

    def prepare(self, rows: list[dict]) -> list[dict]:
        """Examples of rows; what is left out is noted, and how many are equal."""
        made, notices = [], self.notices
        for row in rows:
            with naming(row):
                if self.settings.task != "classify" and excluded(row):
                    notices["rows are left out: their weight is 0"] += 1
                elif example := self.example(row):
                    made.append(example)
        notices["rows"] += len(rows)
        notices["rows are copies of others"] += len(made) - len({*map(content_of, made)})
        return made

    def leave_out(self, why: str) -> None:
        """Note that a row gives no example."""
        self.notices[f"rows are left out: {why}"] += 1

    def micro_batches(self, batches: Batches, step: int) -> list[dict[str, Tensor]]:
        """What this process learns from in a step."""
        return batches(step)

    def on_device(self, examples: list[dict]):
        """Yield (examples, their batch on the device), as much at once as fits. With --shard, all
        processes yield equally many: a repeated batch has no examples."""
        made = [*groups(examples, self.settings.micro_batch * self.settings.context)]
        for group, real, _ in cluster.in_step(self.run, made):
            batch = train.to_device(collate(group, self.settings.context), self.run.device)
            yield group if real else [], batch

    @torch.no_grad()
    def total(self, sums, examples: list[dict]) -> list[float]:
        """sums(batch), a vector, added up over the examples, of which each process has a part."""
        mine, total = examples[self.run.rank::self.run.world], 0.0
        for group, batch in self.on_device(mine or examples[:1]):
            with self.run.autocast():
                total = total + sums(batch).cpu().double() * bool(mine and group)
        return self.run.sum(*total.tolist())

    def save_pretrained(self, out: Path) -> None:
        """What checkpoints.publish writes of the weights."""
        if self.settings.lora and not self.settings.merge:
            save_adapter(self.model, self.settings, out, self.settings.out)
        else:
            merged(self.model).save_pretrained(out)


class SFT(Task):
    """Supervised fine-tuning: the next token, of replies only."""

    def forward(self, batch):
        penalty = getattr(self.model, "L2WRAP", 0.0) if self.training else 0.0
        losses = sft_loss(log_probs(self.model, batch, penalty=penalty))            # (B, T)
        return losses.sum(), (batch["targets"] != -100).sum()

    def example(self, row: dict) -> dict | None:
        messages = conversation(row, notices=self.notices)
        replies = [message for message in messages if message["role"] == "assistant"]
        empty = [message for message in replies if not message["content"].strip()]
        for message in empty:
            message["weight"] = 0
        if not any(message.get("weight", 1) for message in replies):
            return self.leave_out("no reply to learn (none, empty, or of weight 0)")
        self.notices["rows have an empty reply, too, which is not learnt"] += bool(empty)
        asks = messages[-1]["role"] != "assistant"
        self.notices["rows end in a question, which is left out"] += asks
        while messages[-1]["role"] != "assistant":
            messages.pop()
        made = sequence(self.tokenizer, messages, self.settings.context, self.settings.all_tokens,
                        self.notices)
        if made is None:
            return self.leave_out(f"no reply is left within --context {self.settings.context}")
        return {"rows": [made], "messages": messages}

    def measures(self, examples: list[dict]) -> dict:
        self.eval()
        nats, count = self.total(lambda batch: torch.stack(self(batch)), examples)
        self.train()                         # the only task with dropout
        return {"val_loss": nats / count}

    def sample(self, examples: list[dict]) -> str:
        """Answers to held-out prompts."""
        lines = []
        for *asked, right in [example["messages"] for example in examples]:
            prompt = [id for part, _ in chat_parts(self.tokenizer, asked) for id in part]
            [new] = self.model.generate([prompt[:self.settings.context - 1]],
                                        self.settings.max_new_tokens, temperature=0, stop=self.stop)
            lines += [f"prompt: {shown(asked)}", f" reply: {self.tokenizer.decode(new).strip()}",
                      f" right: {right['content']}"]
        return "\n".join(lines)


def width(model) -> int:
    """Its number of channels C."""
    return next(m for m in model.modules() if isinstance(m, nn.Embedding)).embedding_dim


class Classify(Task):
    """Which label a text has: a linear head on the hidden vector of its last token."""
    unit = "texts"

    def __init__(self, settings, run, tokenizer, model, kept):
        super().__init__(settings, run, tokenizer, model, kept)
        self.labels, self.confusion = kept["labels"], None
        self.places = {label_key(label): n for n, label in enumerate(self.labels)}
        bias = kept.get("bias", False)       # of earlier runs
        self.head = nn.Linear(width(model), len(self.labels), bias=bias)
        nn.init.normal_(self.head.weight, std=0.02)
        if not settings.lora and settings.tune == "last":
            blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
            inside, last = ({id(p) for p in m.parameters()} for m in (blocks, blocks[-1]))
            for p in model.parameters():
                p.requires_grad_(id(p) in last or p.dim() == 1 and id(p) not in inside)  # last norm

    def logits(self, batch: dict) -> Tensor:
        """(B, K) fp32."""
        rows = torch.arange(len(batch["tokens"]), device=batch["tokens"].device)
        return self.head(self.model.hidden(batch["tokens"])[rows, batch["length"] - 1]).float()

    def forward(self, batch):
        losses = classify_loss(self.logits(batch), batch["label"])      # (B,)
        return losses.sum(), len(losses)

    def example(self, row: dict) -> dict:
        label = label_of(row)
        if label_key(label) not in self.places:
            raise ValueError(f"label {label!r} is none of {', '.join(self.labels)}")
        return {"rows": [self.sequence(row)], "label": self.places[label_key(label)]}

    def sequence(self, row: dict) -> tuple[list[int], list[int]]:
        """(inputs, no targets) of a text."""
        ids = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(string(row, "text"))]
        ids, limit = ids or ending(self.tokenizer), self.settings.context
        self.notices["texts"] += 1
        self.notices[f"texts are cut at --context {limit}"] += len(ids) > limit
        self.notices.ignore(key for key, value in row.items()
                            if key not in ("text", "label", "where") and value not in EMPTY)
        return ids[:limit], [-100] * len(ids[:limit])

    def measures(self, examples: list[dict]) -> dict:
        K = len(self.labels)

        def sums(batch):
            logits, label = self.logits(batch), batch["label"]
            pairs = torch.bincount(label * K + logits.argmax(-1), minlength=K * K)
            return torch.cat([classify_loss(logits, label).sum()[None], pairs])
        return self.summary(self.total(sums, examples))

    def summary(self, sums: list[float]) -> dict:
        """Measures from the summed loss and the counts of (true, predicted)."""
        self.confusion = torch.tensor(sums[1:]).view(len(self.labels), -1)
        right, true, said = self.confusion.diag(), self.confusion.sum(1), self.confusion.sum(0)
        total, f1 = true.sum().item(), 2 * right / (true + said).clamp(min=1)
        return {"val_loss": sums[0] / total, "accuracy": right.sum().item() / total,
                "macro_f1": f1.mean().item(), "majority": true.max().item() / total}

    def sample(self, examples: list[dict]) -> str:
        """The confusion matrix: a row for each true label, a column for what was said."""
        if self.confusion is None:           # a resumed run has measured nothing yet
            return ""
        wide = max(map(len, self.labels))
        rows = [f"{label:>{wide}} " + "".join(f"{int(n):>6}" for n in row)
                for label, row in zip(self.labels, self.confusion)]
        return "\n".join([" " * wide + "  said: " + ", ".join(self.labels), *rows])

    @torch.no_grad()
    def predict(self, rows: list[dict]) -> None:
        """Print label, probability and text of each row, one on a line."""
        self.eval()
        for row in rows:
            with naming(row):
                batch = collate([{"rows": [self.sequence(row)]}], self.settings.context)
            with self.run.autocast():
                logits = self.logits(train.to_device(batch, self.run.device))
            p, label = logits.softmax(-1)[0].max(-1)
            print(f"{self.labels[label]}\t{p:.3f}\t{' '.join(row['text'].split())}")

    def save_pretrained(self, out: Path) -> None:
        super().save_pretrained(out)
        save_head(out, self.labels, self.head.state_dict(), self.tokenizer.pad_id)


class DPO(Task):
    """Direct preference optimisation: of two replies, make the chosen one more likely."""
    unit = "pairs"

    def log_ratios(self, batch: dict) -> Tensor:
        """(b,): log p(chosen) - log p(rejected); they alternate in the batch."""
        chosen, rejected = log_probs(self.model, batch).sum(1).view(-1, 2).unbind(1)
        return chosen - rejected

    def margins(self, batch: dict) -> Tensor:
        return self.settings.beta * (self.log_ratios(batch) - batch["reference"])   # (b,)

    def forward(self, batch):
        losses = dpo_loss(self.margins(batch), self.settings.label_smoothing)       # (b,)
        return losses.sum(), len(losses)

    def example(self, row: dict) -> dict | None:
        keys, seen = ("chosen", "rejected"), Notices()
        both = [conversation(row, key, seen) for key in keys]
        self.notices.ignore(key for key in seen.ignored if key not in keys)
        if both[0] == both[1]:
            return self.leave_out("chosen and rejected are equal")
        if not all(messages[-1]["content"].strip() for messages in both):
            return self.leave_out("chosen or rejected is empty")
        limit = self.settings.context
        pair = [sequence(self.tokenizer, messages, limit, notices=self.notices)
                for messages in both]
        if not all(pair):
            return self.leave_out(f"no reply is left within --context {limit}")
        if pair[0] == pair[1]:
            return self.leave_out(f"chosen and rejected are equal when cut at --context {limit}")
        return {"rows": pair, "messages": both, "reference": 0.0}

    @torch.no_grad()
    def remember_start(self, examples: list[dict]) -> None:
        """Give each example its log-ratio at the start; a resumed run has kept it."""
        if "reference" not in self.kept:
            self.run.say(f"reference  log-probabilities of {len(examples)} pairs at the start")
            for group, batch in self.on_device(examples[self.run.rank::self.run.world]):
                with self.run.autocast():
                    for example, ratio in zip(group, self.log_ratios(batch).tolist()):
                        example["reference"] = ratio
            self.kept["reference"] = self.run.sum(*[e["reference"] for e in examples])
        for example, ratio in zip(examples, self.kept["reference"]):
            example["reference"] = ratio

    def measures(self, examples: list[dict]) -> dict:
        def sums(batch):
            margins = self.margins(batch)
            margins = margins * (margins.abs() > 1e-4)                  # below, it is rounding
            right = 0.5 + 0.5 * margins.sign()                          # a tie is half right
            losses = dpo_loss(margins, self.settings.label_smoothing)
            return torch.stack([losses, margins, right, torch.ones_like(right)]).sum(1)
        loss, margin, right, count = self.total(sums, examples)
        return {"val_loss": loss / count, "margin": margin / count, "accuracy": right / count}

    @torch.no_grad()
    def sample(self, examples: list[dict]) -> str:
        """Held-out pairs and their margins."""
        lines = []
        for example in examples:
            [(_, batch)] = self.on_device([example])
            (*asked, chosen), (*_, rejected) = example["messages"]
            lines += [f"margin {self.margins(batch).item():+.2f}  {shown(asked)}",
                      f"    chosen   {chosen['content']!r:.80}",
                      f"    rejected {rejected['content']!r:.80}"]
        return "\n".join(lines)


class GRPO(Task):
    """Group relative policy optimisation: completions that earn more than the mean of their group,
    which has the same prompt, become more likely."""

    def __init__(self, settings, run, tokenizer, model, kept):
        super().__init__(settings, run, tokenizer, model, kept)
        self.score, self.reads = score_code, set()
        if settings.reward:
            run.say(f"reward     EXECUTES {settings.reward}: it is your own code")
            self.score, self.reads = load_reward(settings.reward)
        self.silent = set(tokenizer.special_ids.values()) & self.stop   # end, and are no text
        if not settings.data:                # there, a blank line ends a function, too
            self.stop |= {id for id in range(tokenizer.vocab_size)
                          if b"\n\n" in tokenizer.to_bytes([id])}
        if settings.kl:                      # the model as it is now, for the divergence from it
            start = merged(model, strength=0) if settings.lora else copy.deepcopy(model)
            self.start = start.requires_grad_(False)

    def forward(self, batch):
        new = log_probs(self.model, batch, self.settings.temperature)   # (B, T)
        losses = grpo_loss(new, batch["old"], batch["reference"], batch["advantage"][:, None],
                           self.settings.clip_ratio, self.settings.kl)
        drawn = batch["targets"] != -100
        return (losses * drawn).sum(), drawn.sum()

    def example(self, row: dict) -> dict | None:
        seen = Notices()
        asked = conversation(row, "", seen)
        if self.reads is not None:           # else the reward gets all that the row has
            self.notices.ignore(key for key in seen.ignored if key not in self.reads)
        while asked and asked[-1]["role"] == "assistant":               # what is to be drawn
            asked.pop()
        if not asked:
            raise ValueError("it has no prompt")
        ids = [id for part, _ in chat_parts(self.tokenizer, asked) for id in part]
        if len(ids) + 8 > self.settings.context:
            return self.leave_out("the prompt has no room for a completion within --context "
                                  f"{self.settings.context}")
        return {"rows": [(ids, ids)], "prompt": shown(asked[-1:]), "messages": asked, "row": row}

    def draw(self, prompts: list[dict], seed: int) -> list[dict]:
        """A group of completions of each prompt, as examples, with what each of them earned."""
        size, made = self.settings.group, []
        asked = [prompt["rows"][0][0] for prompt in prompts for _ in range(size)]
        drawn = [[] for _ in asked]          # with the stop tokens, which generate leaves out
        most = max(size, 8 * self.settings.micro_batch)                 # no gradients: more fit
        for first in range(0, len(asked), most):
            rows = drawn[first:first + most]
            self.model.generate(asked[first:first + most], self.settings.max_new_tokens,
                                temperature=self.settings.temperature, stop=self.stop,
                                seed=seed + first, on_token=lambda row, id: rows[row].append(id))
        for n, prompt in enumerate(prompts):
            ids, group = prompt["rows"][0][0], drawn[n * size:(n + 1) * size]
            texts = [self.tokenizer.to_bytes([id for id in new if id not in self.silent], False)
                     .decode("utf-8", "replace") for new in group]
            if self.tokenizer.chat_format:   # what is seen of a reply, as in chat.py
                texts = [words.strip() for words in texts]
            rewards = self.score(prompt, texts, [new[-1] in self.stop for new in group])
            for new, words, reward, better in zip(group, texts, rewards, advantages(rewards)):
                row = ([*ids, *new][:-1], [-100] * (len(ids) - 1) + new)
                made.append({"rows": [row], "asked": prompt["messages"], "text": words,
                             "drawn": len(new), "reward": reward, "advantage": better})
        return made

    def means(self, made: list[dict]) -> dict:
        """Means over completions: reward, length; the fraction that is distinct in its group."""
        size = self.settings.group
        different = sum(len({m["text"] for m in made[i:i + size]})
                        for i in range(0, len(made), size))
        sums = self.run.sum(sum(m["reward"] for m in made), sum(m["drawn"] for m in made),
                            different, len(made))
        return {n: total / sums[3] for n, total in zip(("reward", "length", "distinct"), sums)}

    def micro_batches(self, batches: Batches, step: int) -> list[dict[str, Tensor]]:
        """New completions, which serve --updates steps."""
        now = step // self.settings.updates
        if self.kept.get("round") != now:
            self.kept.update(round=now, drawn=self.rollouts(batches.chosen(now), step))
        return self.kept["drawn"]

    @torch.no_grad()
    def rollouts(self, prompts: list[dict], step: int) -> list[dict[str, Tensor]]:
        """Micro-batches of new completions, with their log-probabilities now and at the start."""
        made, batches = self.draw(prompts, self.run.step_seed(self.settings.seed, step)), []
        self.kept["means"] = self.means(made)
        for _, batch in self.on_device(made):
            with self.run.autocast():
                batch["old"] = log_probs(self.model, batch, self.settings.temperature)
                batch["reference"] = (log_probs(self.start, batch, self.settings.temperature)
                                      if self.settings.kl else batch["old"])
            batches.append(batch)
        return batches

    def measures(self, prompts: list[dict]) -> dict:
        """Means over completions of the first prompts, always drawn with the same seed."""
        prompts = prompts[:max(1, self.settings.eval_examples // self.settings.group)]
        return self.means(self.draw(prompts[self.run.rank::self.run.world], seed=0))

    def sample(self, prompts: list[dict]) -> str:
        """Completions of held-out prompts, the first of each group."""
        return "\n".join(f"--- reward {m['reward']:g} ---\n{shown(m['asked'])}{m['text']}"
                         for m in self.draw(prompts, seed=1)[::self.settings.group])

# ------------------------------------------------------------------------------------------ loading

# task -> its class, default rows, examples in a step, epochs, learning rate relative to sft's
RECIPES = {"sft": (SFT, question_rows, 16, 3, 1.0), "classify": (Classify, label_rows, 16, 4, 1.0),
           "dpo": (DPO, preference_rows, 16, 2, 0.3), "grpo": (GRPO, header_rows, 8, 1, 1.0)}


def check_settings(settings: Settings, given: set[str]) -> None:
    """ValueError for flags that do not go together, before any work."""
    if not (settings.init_from and (settings.task or settings.merge)):
        raise ValueError("give --task and --init-from CHECKPOINT (python train.py makes out/gpt)")
    for spec in dataclasses.fields(Settings):
        name, about = f"--{spec.name.replace('_', '-')}", spec.metadata
        if spec.name in given and about.get("task") not in (None, settings.task):
            raise ValueError(f"{name} is a flag of --task {about['task']}")
        if spec.name in given and "needs" in about and not getattr(settings, about["needs"]):
            raise ValueError(f"{name} needs --{about['needs']}")
    if settings.base_dtype:
        if settings.base_dtype != "bfloat16" and settings.task == "grpo":
            raise ValueError(f"--base-dtype {settings.base_dtype} is not for grpo, which needs the "
                             "original weights too: take bfloat16")
        if settings.merge or settings.dtype not in (None, "bfloat16"):
            raise ValueError("--base-dtype computes in bfloat16 and leaves an adapter, which "
                             "belongs to the original weights: without --dtype and --merge")
        settings.dtype = "bfloat16"
    if settings.shard and (settings.base_dtype or settings.task == "grpo"
                           or settings.compile != "off"):
        raise ValueError("--shard is for sft, classify and dpo (grpo draws on each process by "
                         "itself), without --base-dtype and --compile")
    if settings.steps and settings.epochs:
        raise ValueError("--steps and --epochs each decide how long it takes: give one")
    if settings.task == "grpo" and settings.data and not settings.reward:
        raise ValueError("--task grpo --data needs --reward FILE.py: a file that has "
                         "reward(prompt, completion)")


def open_start(settings: Settings):
    """(name in MODELS, model on the CPU, tokenizer) of --init-from: of a checkpoint, or of an
    adapter, which is merged with its base."""
    folder = base = locate(settings.init_from)
    adapter = adapter_folder(folder)
    if settings.base and not adapter:
        raise ValueError(f"--base is for adapters, and {folder} is none")
    if adapter:
        if settings.lora:
            raise ValueError(f"--lora: {folder} is an adapter itself: --merge it first")
        folder, base = adapter, find_base(adapter, settings.base)
    name = identify(base)
    values = config_values(model_parts(name)[1], settings.config)
    dtype = torch.bfloat16 if settings.base_dtype else torch.float32
    model = load_checkpoint(base, "cpu", None if settings.shard else dtype, **values)
    if adapter:
        load_adapter(folder, model)
        model = merged(model)
    tokenizer = text.load_tokenizer(settings.tokenizer or folder)
    check_vocabulary(model.config, tokenizer)
    if tokenizer.end_id is None and not tokenizer.stop_ids:
        raise ValueError("the tokenizer has no token that ends a text: answers could not end")
    settings.init_from = str(folder)
    return name, model, tokenizer


def write_merged(settings: Settings, run: Run, name: str, model, tokenizer) -> None:
    """--merge without --task: the plain checkpoint that an adapter makes of its base."""
    out, place = make_run_directory(settings.out, name), Path(settings.init_from)

    def save(folder):
        model.save_pretrained(folder)
        if head := read_head(place):
            save_head(folder, *head, tokenizer.pad_id)
    save_weights(save, out)
    tokenizer.save(out, model_max_length=model.config.context)
    if (place / "generation_config.json").exists():
        shutil.copy(place / "generation_config.json", out)
    write_card(out)
    run.say(f"run        {out}: the merged weights")


def fill_defaults(settings: Settings, tokenizer, model) -> None:
    """Decide what was left open and does not need the data: also the chat format, and which tokens
    end a reply, in the tokenizer and in the model's config."""
    _, _, batch, epochs, rate = RECIPES[settings.task]
    settings.batch = settings.batch or batch
    settings.epochs = settings.epochs or (None if settings.steps else epochs)
    most, narrow = model.config.context, 256 / width(model)
    if most and (settings.context or 0) > most:
        raise ValueError(f"--context {settings.context}: the model's is {most}")
    settings.context = settings.context or min(1024, most or 1024)
    if settings.lora:
        settings.lora_alpha = settings.lora_alpha or 2.0 * settings.lora
    # the learning rate of an adapter need not fall as fast with the width
    settings.lr = settings.lr or 1e-3 * rate * (3 * narrow if settings.lora else narrow**2)
    if settings.chat is None:                # a model that completes text goes on doing so
        plain = settings.task == "grpo" and not (settings.data and tokenizer.chat_format)
        settings.chat = "none" if plain else tokenizer.chat_format or "alpaca"
    if settings.task != "classify":          # nothing is said there
        tokenizer.chat_format = None if settings.chat == "none" else settings.chat
        if settings.chat != "world":         # there, a blank line ends a reply
            stops = sorted({*eos_tokens(model.config), *ending(tokenizer)})
            model.config = dataclasses.replace(model.config, eos_token_id=stops)


def open_task(settings: Settings, run: Run, tokenizer, model, rows: list[dict], kept: dict,
              notices: Notices) -> Task:
    """The task on the device, with new adapters, and with a new head or that of --init-from."""
    torch.manual_seed(settings.seed)         # adapters and heads are drawn
    if settings.lora:
        bits = settings.base_dtype if settings.base_dtype != "bfloat16" else None
        add_lora(model, settings, bits)
    head, start = {}, Path(settings.init_from)
    if settings.task == "classify" and not kept:
        with readable(start):
            found = read_head(start)
        if found:
            kept["labels"], head = found
            kept["bias"] = "bias" in head
        elif settings.predict:
            raise ValueError(f"--predict: {settings.init_from} has no head yet: train one first")
        else:
            kept["labels"] = all_labels(rows, notices)
        if len(kept["labels"]) < 2:
            raise ValueError("two labels are needed, there is "
                             + (", ".join(kept["labels"]) or "none"))
    task = RECIPES[settings.task][0](settings, run, tokenizer, model, kept)
    task.notices = notices
    if head:
        task.head.load_state_dict(head)
    return task.train(settings.task == "sft")               # the others: no dropout


def plan(settings: Settings, run: Run, name: str, task: Task, learn: list[dict],
         held: list[dict]) -> float:
    """Decide what depends on data and machine, and say it; roughly the targets of a step."""
    if settings.batch < run.world:
        raise ValueError(f"--batch {settings.batch} leaves some of {run.world} processes idle")
    for what, examples in (("learn from", learn), ("measure on", held)):
        if not examples:
            lost = [line for line in task.notices.lines()
                    if "are left out" in line or "are copies" in line]
            raise ValueError(f"no examples to {what}: {'; '.join(lost) or 'give more data'}")
    if settings.epochs:
        steps = settings.epochs * len(learn) / settings.batch
        settings.steps = math.ceil(steps * (settings.updates if settings.task == "grpo" else 1))
        settings.epochs = None
    rows = settings.batch * {"dpo": 2, "grpo": settings.group}.get(settings.task, 1)
    known = sum(id != -100 for e in learn for _, targets in e["rows"] for id in targets)
    sizes = {name: p.numel() for name, p in task.named_parameters()}    # GRPO's has its start, too
    total = sum(size for name, size in sizes.items() if not name.startswith("start."))
    total += sum(m.frozen.shape.numel() for m in task.modules() if getattr(m, "frozen", None))
    kept = sum(sizes.values())
    if settings.base_dtype:                  # counted in numbers of 4 bytes
        kept = sum(t.nbytes for t in [*task.parameters(), *task.buffers()]) // 4
    learned = sum(p.numel() for p in task.parameters() if p.requires_grad)
    source = ", ".join(settings.data) or "the source of Python's standard library"
    run.say(f"data       {source}: {len(learn)} examples to learn from, {len(held)} held out")
    for notice in task.notices.lines():
        run.say(f"data       {notice}")
    run.say(f"model      {name}, {total:,} parameters, of which {learned:,} learn")
    with torch.device("meta"):
        empty = train.NextTokenLoss(type(task.model)(task.config).train())
    train.plan_memory(settings, run, empty, rows, kept, learned)
    run.say(f"plan       {settings.task}: {settings.steps} steps of {settings.batch} examples, "
            f"learning rate {settings.lr:.2g}" + (
                f", chat format {settings.chat}" if settings.task != "classify" else ""))
    return max(rows, round(rows * known / len(learn)))

# --------------------------------------------------------------------------------------------- main


def finetune(settings: Settings, given: set[str]) -> None:
    """The script: model, rows, task, loop."""
    saved, again = None, cluster.restarted(settings, given)
    if settings.resume:
        out, saved = load_resume(settings.resume)
        settings, changed = resume_settings(Settings, saved, settings, given, out,
                                            train.HARMLESS | {"samples", "eval_examples"})
    else:
        check_settings(settings, given)
    with contextlib.redirect_stdout(sys.stderr if settings.predict else sys.stdout):
        run = train.start_run(settings, train.STARTED)  # of a prediction only labels go to stdout
    if saved:
        name, tokenizer = saved["name"], saved_tokenizer(saved)
        model_class, config_class, _ = model_parts(name)
        if settings.base_dtype:              # what is frozen in few bits is not saved
            _, model, _ = open_start(settings)
            model.config = config_class(**saved["config"])
        else:
            with torch.device("meta" if settings.shard else "cpu"):
                model = model_class(config_class(**saved["config"]))
    else:
        name, model, tokenizer = open_start(settings)
        if not settings.task:
            return write_merged(settings, run, name, model, tokenizer)
        fill_defaults(settings, tokenizer, model)
    place = [settings.predict] if settings.predict else settings.data
    notices = Notices()
    reading = (settings.encoding, settings.columns, notices)
    rows = read_rows(place, *reading) if place else RECIPES[settings.task][1]()
    if saved:
        saved["task"].setdefault("bias", "head.bias" in saved.get("model", ()))
    task = open_task(settings, run, tokenizer, model, rows, saved["task"] if saved else {}, notices)
    if settings.predict:
        task.to(run.device).predict(rows)
        for notice in notices.lines():
            print(notice, file=sys.stderr)
        return

    learn, held = split(task.prepare(rows), settings)
    if settings.val:
        held = task.prepare(read_rows(settings.val, *reading))
    key = hashlib.blake2b(repr([[e["rows"] for e in part] for part in (learn, held)]).encode(),
                          digest_size=8).hexdigest()
    if saved and key != saved["data"]:
        raise ValueError(f"--resume {settings.out}: the data have changed since it was started")
    nominal = plan(settings, run, name, task, learn, held)
    if settings.checkpoint_activations:
        train.checkpoint_blocks(task.model)
    whole = cluster.shard(task, run) if run.sharded else task.to(run.device)
    if settings.task == "dpo":
        task.remember_start(learn + held)
    batches = Batches(learn, settings, run)
    optimizer, scaler = train.make_optimizer(task, settings.weight_decay), run.scaler()
    step, best = 0, {"step": 0, "done": 0.0, "measures": {}}

    def publish_weights():
        with cluster.gathered(whole, task, run) as full:
            if run.rank == 0:
                publish(full, tokenizer, settings, run.out)

    def save():
        with cluster.saving(task, optimizer, run, Path(settings.out), step) as folder:
            if run.rank == 0:
                tensors = {} if run.sharded else {"model": task.state_dict(),
                                                  "optimizer": optimizer.state_dict()}
                save_resume(folder, settings, run, tokenizer, key, task.config, name=name,
                            step=step, before=before, best=best, task=task.kept,
                            scaler=scaler.state_dict(), **tensors)
        if settings.keep == "last" or best["step"] in (0, step):
            publish_weights()
        if run.rank == 0:
            draw_log(run.out)

    @contextlib.contextmanager
    def saving():
        """Save what was learnt before a user's reward ends the run."""
        try:
            yield
        except RewardError as error:
            save()
            raise ValueError(f"{error}; the state after step {step} is saved: --resume {run.out} "
                             "goes on") from None
    if saved:
        step, best = train.restore(run, saved, changed, task, optimizer, scaler, task)
        if max(run.world, saved["world"]) > 1:                          # each has drawn its own
            task.kept.pop("round", None)
    held_out = held[:settings.eval_examples]
    before = saved["before"] if saved else task.measures(held_out)
    run.say("before     " + train.shown(before))
    if settings.eval_only:
        return
    if not saved:
        run.say(task.sample(held[:settings.samples]))
    if run.rank == 0:
        run.out = (out if saved else Path(settings.out) if again
                   else make_run_directory(settings.out, f"{name}-{settings.task}"))
        settings.out = str(run.out)
        cluster.mark_run(run.out)
        run.say(f"run        {run.out}")
        if not saved:
            run.log(step=0, **before)
    settings.out, loss = cluster.agree(run, settings.out), task
    if settings.compile != "off":            # else nothing is drawn before the loop
        loss = train.compile_loss(settings.compile, run, task, task.micro_batches(batches, step)[0])
    loss = cluster.overlapping(loss, run, settings.task == "classify")
    pace = train.Pace(settings, run, step)
    with train.Interrupt() as interrupt, saving():
        while pace.done < 1:
            begun = time.perf_counter()
            torch.manual_seed(run.step_seed(settings.seed, step))
            lr = train.learning_rate(settings, step, pace.steps)
            mean, norm, count = train.training_step(
                run, loss, optimizer, scaler, task.micro_batches(batches, step), lr, settings.clip,
                nominal)
            speed = count / (time.perf_counter() - begun)
            step += 1
            pace.after(step)
            pace.report(step, mean, lr, norm, speed, task.unit, **task.kept.get("means", {}))
            if pace.skipped == 10:
                step -= 10
                save()
                raise ValueError("ten steps in a row had no finite loss or gradient: the state "
                                 f"after step {step} is saved; try a lower --lr")
            if pace.due(settings.eval_every, 10, step):
                after = task.measures(held_out)
                run.log(step=step, **after)
                run.say("           validation: " + train.shown(after))
                if not best["step"] or better(after, best["measures"]):
                    best = {"step": step, "done": pace.done, "measures": after}
                    if settings.keep == "best":
                        publish_weights()
                elif settings.keep == "best":
                    pace.stop_if_no_better(step, best)
            if pace.done < 1 and pace.due(settings.sample_every, 3, step):
                run.say(task.sample(held[:settings.samples]))
            stop = interrupt.seen(run)
            if pace.save_is_due() or stop:
                save()
            if stop:
                run.say(f"stopped after step {step}; to go on:  "
                        f"python finetune.py --resume {run.out}")
                raise SystemExit(128 + stop)
    if settings.keep == "last" or best["step"] == step:                 # else it is not kept
        run.say(task.sample(held[:settings.samples]))
    after = best["measures"] if settings.keep == "best" else task.measures(held_out)
    save()
    if run.rank == 0:
        write_card(run.out)
    if settings.keep == "best":
        run.say(f"the weights kept are those of step {best['step']}, the best validation")
    for measure, value in after.items():
        run.say(f"{measure:<10} {before[measure]:.4f} -> {value:.4f}")
    use = f"python chat.py {settings.out}"
    if settings.task == "classify":
        use = f"python finetune.py --task classify --init-from {settings.out} --predict FILE"
    elif settings.lora and not settings.merge:
        use = f"python finetune.py --merge --init-from {settings.out} --out NEW"
    run.say(f"{train.clock(time.time() - run.started)} in all, peak memory "
            f"{train.peak_bytes(run.device) / 2**30:.2f} GB. Use it:  {use}")
    if not settings.data:
        run.say(f"With your own examples: python finetune.py --task {settings.task} --init-from "
                f"{settings.init_from} --data FILE ...")


def better(measures: dict, than: dict) -> bool:
    """Whether a validation is better than another: a smaller loss, or a larger reward."""
    if "reward" in measures:
        return measures["reward"] > than["reward"]
    return measures["val_loss"] < than["val_loss"]


def main(argv: list[str] | None = None) -> None:
    """`python finetune.py`."""
    argv = sys.argv[1:] if argv is None else argv
    train.run_script("finetune.py", finetune,
                     *train.parse_settings(Settings, argv, __doc__.split("\n")[0]))


if __name__ == "__main__":
    main()
