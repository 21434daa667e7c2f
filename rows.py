"""Rows to fine-tune on: those of files, and the default ones, from Python's standard library.

A row is an object of JSON, a line of a table, or a list of messages. It has one of these shapes:

    prompt                      reply                        for example
    messages, conversations,    in it                        ShareGPT, lmsys-chat, UltraChat, LIMA
      conversation
    instruction                 output, response             Alpaca (and input), Dolly (and context)
    prompt                      completion, response, ...    what TRL calls prompt-completion
    question                    answer, response, ...        GSM8K, OpenOrca (and system_prompt)
    query                       response, ...                MetaMathQA
    input                       output, ...
    any of them, or nothing     chosen, rejected             for dpo; a list may hold its prompt
    text                        label                        for classify

A message is {"role", "content"} or {"from", "value"}, its content a text or a list of texts. Beside
a prompt, `input` or `context` is shown with it, `system` or `system_prompt` and `history` before
it, `tools` in the chat formats that have them. A message with `weight` 0, `train` false, `loss` or
`loss_mask` 0 is read and not learnt. Keys are known in any case, and others by --columns. What else
a row has is ignored, and named in a line: see `Notices`.
"""
import ast
import contextlib
import csv
import inspect
import io
import json
import math
import random
import re
import runpy
import textwrap
import tokenize
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import data
import train
from tokenizer import CHAT_FORMATS

# ---------------------------------------------------------------------------------- what a row says

CHATS = ("messages", "conversations", "conversation")
SHAPES = {  # key of the prompt -> keys where the reply may stand; the first that a row has counts
    **dict.fromkeys(CHATS, ()),
    "instruction": ("output", "response", "completion", "answer"),
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "output", "completion"),
    "query": ("response", "answer", "output", "completion"),
    "input": ("output", "response", "answer", "completion")}
ROLES = {role: role for _, roles, *_ in CHAT_FORMATS.values() for role in roles} | {
    "human": "user", "prompter": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"), "assistant")}
WEIGHTS = ("weight", "train", "loss_mask")      # whether a row, or a message, is learnt
OURS = {*SHAPES, *(key for keys in SHAPES.values() for key in keys), *WEIGHTS, "system", "tools",
        "system_prompt", "history", "context", "chosen", "rejected", "text", "label"}
FORMATS = ("input", "metadata", "tools", "stop_reason")   # keys that some chat formats know
READ = ("role", "from", "content", "value", "loss", *WEIGHTS)      # of every message
REFUSED = ("tool_calls", "function_call", "reasoning_content", "thinking", "images", "audio")
EMPTY = (None, "", [], {})


class Notices(Counter):
    """What was left out, cut, joined or ignored, counted as rows are read: a line each in the end.

    notices["replies"] = 400; notices["replies are cut"] = 12:  "12 of 400 replies are cut"
    """

    def __init__(self):
        super().__init__()
        self.said, self.ignored = [], {}     # whole lines; keys of rows, in their order

    def ignore(self, keys) -> None:
        self.ignored.update(dict.fromkeys(keys))

    def lines(self) -> list[str]:
        counted = [f"{count} of {self[what.split()[0]]} {what}"
                   for what, count in self.items() if " " in what and count]
        ignored = [f"ignored: {', '.join(self.ignored)}"] if self.ignored else []
        return [*self.said, *counted, *ignored]


@contextlib.contextmanager
def naming(row: dict):
    """What is wrong with a row is told with its file and line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row['where']}: {error}" if "where" in row else str(error)) from None


def missing(row: dict, *names: str) -> ValueError:
    """The error of a row without these keys: what it has instead, and how that is named."""
    has = ", ".join(str(key) for key in row if key != "where") or "nothing"
    absent = [name for name in names if name not in row]
    others = [key for key in row if key not in OURS and key != "where"]
    example = " ".join(f"{name}={other}" for name, other in zip(absent, others))
    return ValueError(f"it has {has}: it needs " + " and ".join(f'"{name}"' for name in absent)
                      + f"; other names: --columns {example or absent[0] + '=NAME'}")


def string(row: dict, name: str) -> str:
    """The text under a key."""
    if name not in row:
        raise missing(row, name)
    if not isinstance(row[name], str):
        raise ValueError(f'"{name}" is {row[name]!r:.80}: a text is needed')
    return row[name]


def conversation(row: dict, reply: str | None = None, notices: Notices | None = None) -> list[dict]:
    """The messages of a row, [{"role", "content"}, ...], whatever its shape.

    reply: the key of the reply; None: the one of the shape; "": no reply. A reply that is a list of
    messages may begin with what was asked. Keys that are not read are noted as ignored.
    """
    notices = Notices() if notices is None else notices
    left = {key: value for key, value in row.items() if key != "where"}
    asked = first_of(left, SHAPES)
    said = first_of(left, SHAPES.get(asked, ()) if reply is None else [reply])
    check_shape(left, asked, said, reply)
    messages = turns(left, asked, "user", notices) if asked else []
    answer = turns(left, said, "assistant", notices) if said else []
    if answer and answer[0]["role"] != "assistant":
        messages = []                        # the reply holds its prompt
    elif not asked:
        raise missing(row, "prompt")
    elif asked not in CHATS:
        extra = [string(left, key) for key in ("input", "context") if left.get(key)]
        if extra and messages:
            messages[-1]["input"] = "\n\n".join(extra)
        left = {key: value for key, value in left.items() if key not in ("input", "context")}
    messages += answer
    if left.get("history"):
        messages = turns(left, "history", "user", notices) + messages
    for key in ("system", "system_prompt"):
        if left.get(key):
            messages = with_system(messages, string(left, key), key)
            del left[key]
    tools = from_json(left.pop("tools", None))
    if tools not in EMPTY:
        if not isinstance(tools, list):
            raise ValueError(f'"tools" is {tools!r:.80}: a list is needed')
        if not messages or messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = tools
    notices.ignore(key for key, value in left.items()
                   if key not in WEIGHTS and value not in EMPTY)
    return messages


def first_of(row: dict, keys) -> str | None:
    """The first of the keys that has a value in the row, else the first that is there at all."""
    there = [key for key in keys if key in row]
    return next((key for key in there if row[key]), there[0] if there else None)


def check_shape(row: dict, asked: str | None, said: str | None, reply: str | None) -> None:
    """ValueError for a row that has no known shape, or for what would be learnt wrongly."""
    if asked is None and said is None:
        if {"role", "content"} <= row.keys():
            raise ValueError('it is one message: a row is a conversation, {"messages": [...]}')
        if "text" in row:
            raise ValueError(f'"text" is {row["text"]!r:.60}: a prompt and a reply are needed; '
                             "plain text, or a chat already rendered, is for train.py --init-from")
        raise missing(row, "prompt", *([] if reply == "" else [reply or "completion"]))
    if said is None and (reply or reply is None and asked not in CHATS):
        raise missing(row, reply or SHAPES[asked][0])
    if row.get("label") is False:
        raise ValueError('"label" is false: this reply is not to be learnt; leave such rows out')
    if asked in CHATS and row.get("context"):
        raise ValueError(f'"context" is {row["context"]!r:.60}: put it into one of the messages')


def turns(row: dict, key: str, role: str, notices: Notices) -> list[dict]:
    """The messages under a key, which is taken out of the row: a text, by this role; a message; a
    list of messages, of texts by turns, or (history) of pairs of texts."""
    value = row.pop(key)
    if key in (*CHATS, "history"):
        value = from_json(value)
    elif isinstance(value, str):
        return [{"role": role, "content": value}]
    found = [value] if isinstance(value, dict) else value
    if key == "history" and isinstance(found, list):
        found = [turn for pair in found for turn in (pair if isinstance(pair, list) else [pair])]
    if not isinstance(found, list):
        wanted = "" if key in (*CHATS, "history") else "a text or "
        raise ValueError(f'"{key}" is {value!r:.80}: {wanted}a list of messages is needed')
    if role == "user" and all(isinstance(turn, str) for turn in found):
        return [{"role": ("user", "assistant")[n % 2], "content": turn}
                for n, turn in enumerate(found)]
    return [message(turn, n, notices) for n, turn in enumerate(found)]


def message(found, n: int, notices: Notices) -> dict:
    """A message in our words: {"role", "content"}; "weight", 0 or 1, if it is stated; and the keys
    that some chat formats know."""
    if not isinstance(found, dict):
        raise ValueError(f'message {n} is {found!r:.80}, not {{"role": ..., "content": ...}}')
    role, content = (found.get("role") or found.get("from"),
                     found.get("value") if found.get("content") is None else found["content"])
    if isinstance(content, list):            # of parts
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"message {n} needs a role and content (text): {found!r:.150}")
    if role.lower() not in ROLES:
        raise ValueError(f"message {n} has the role {role!r}: known are {', '.join(ROLES)}")
    made = {"role": ROLES[role.lower()], "content": content}
    if (weight := weight_of(found, "loss")) is not None:
        made["weight"] = weight
    for key, value in found.items():
        if key in REFUSED and value not in EMPTY:
            raise ValueError(f'"{key}" of message {n} is {value!r:.80}: only texts can be learnt')
        if key in FORMATS and value not in EMPTY:
            made[key] = value
        elif key not in READ and value not in EMPTY:
            notices.ignore([f"{key} of messages"])
    return made


def weight_of(fields: dict, *more: str) -> int | None:
    """Whether a row, or a message, says that it is to be learnt: 1, 0 or None."""
    for key in (*WEIGHTS, *more):
        if fields.get(key) is not None:
            known = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
            if str(fields[key]).lower() not in known:
                raise ValueError(f'"{key}" is {fields[key]!r:.60}: only 0 and 1 are supported')
            return known[str(fields[key]).lower()]
    return None


def with_system(messages: list[dict], system: str, key: str) -> list[dict]:
    """The messages with this one before them, unless they begin with it."""
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise ValueError(f'"{key}" is {system!r:.60}: the messages begin with another, '
                         f"{messages[0]['content']!r:.60}")
    return messages


def from_json(value):
    """A list that some data sets have as JSON inside JSON, or in a column of a table."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def excluded(row: dict) -> bool:
    """Whether a row of prompt and reply says itself that it is not to be learnt."""
    return bool({*SHAPES, "chosen"} & row.keys()) and weight_of(row) == 0

# ------------------------------------------------------------------------------- messages to tokens

# How a chat begins that is already rendered, and would be put into a chat format once more.
RENDERED = re.compile(r"\s*(<\|(im_start|user|system|begin_of_text|start_header_id)\|>|<s>|<bos>|"
                      r"\[INST\]|\[gMASK\]|<start_of_turn>|###? ?(Human|Instruction|User):|"
                      r"Human: |Below is an instruction that describes a task)")


def chat_parts(tokenizer, messages: list[dict]) -> list[tuple[list[int], bool]]:
    """tokenizer.chat_parts; without a chat format, prompt and completion as plain text."""
    messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    if tokenizer.chat_format != "alpaca":    # it alone knows "input"
        messages = [{"role": m["role"], "content": shown([m])} if m.get("input") else m
                    for m in messages]
    if tokenizer.chat_format:
        known = ("role", "content", *CHAT_FORMATS[tokenizer.chat_format][2])
        for key, value in [item for m in messages for item in m.items()]:
            if value and key not in known:
                raise ValueError(f'"{key}" is {value!r:.80}: the chat format '
                                 f"{tokenizer.chat_format} has no place for it")
        if found := RENDERED.match(messages[0]["content"] if messages else ""):
            raise ValueError(f"a chat that is already rendered, it begins with {found[0]!r}: give "
                             "its messages, or plain text by --chat none")
        try:
            return tokenizer.chat_parts(messages)
        except (TypeError, KeyError, AttributeError) as error:          # of tools
            raise ValueError(f"{type(error).__name__}: {error}") from None
    if [m["role"] for m in messages] not in (["user"], ["user", "assistant"]):
        raise ValueError("--chat none takes one prompt and one completion")
    prompt, *reply = [tokenizer.encode(m["content"]) for m in messages]
    prompt = [*tokenizer.prefix_ids, *prompt] or ending(tokenizer)
    return [(prompt, False)] + [(ids + ending(tokenizer), True) for ids in reply]


def shown(messages: list[dict]) -> str:
    """Messages as a person reads them: all that they say, and who says it if they are several."""
    said = [f"{m['content']}\n\n{m['input']}" if m.get("input") else m["content"]
            for m in messages]
    if len(said) > 1:
        said = [f"{m['role']}: {words}" for m, words in zip(messages, said)]
    return "\n".join(said)


def ending(tokenizer) -> list[int]:
    """The tokens that end a reply."""
    if not tokenizer.chat_format:
        return [tokenizer.stop_ids[0] if tokenizer.end_id is None else tokenizer.end_id]
    silence = [{"role": role, "content": ""} for role in ("user", "assistant")]
    reply = tokenizer.chat_parts(silence)[-1][0]
    return reply if tokenizer.chat_format == "world" else reply[-1:]    # there: a blank line

# ------------------------------------------------------------------------------------------ labels


def label_of(row: dict) -> str:
    """The label of a row, as text."""
    if "label" not in row:
        raise missing(row, *(["label"] if "text" in row else ["label", "text"]))
    label = row["label"]
    if isinstance(label, (list, dict)):
        raise ValueError(f'"label" is {label!r:.80}: a text or a number is needed')
    if label is None or label != label or not str(label).strip():       # NaN is what pandas writes
        raise ValueError('it has no "label": it is empty')
    return str(label).strip()


def label_key(label: str) -> str:
    """The same for labels that differ only in case, in space, or as 0, 0.0 and "0" do."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", " ".join(label.split()).casefold())


def all_labels(rows: list[dict], notices: Notices) -> list[str]:
    """The labels of all rows in the spelling that is most frequent."""
    spellings = defaultdict(Counter)
    for row in rows:
        with naming(row):
            label = label_of(row)
        spellings[label_key(label)][label] += 1
    for found in spellings.values():
        if len(found) > 1:
            told = ", ".join(f"{label!r} ({count})" for label, count in found.most_common())
            notices.said.append(f"taken as one label: {told}")
    if once := [label for found in spellings.values() if found.total() == 1 for label in found]:
        notices.said.append("labels of one row only, which is learnt and not validated: "
                            + data.shorten(once))
    return sorted(found.most_common(1)[0][0] for found in spellings.values())

# --------------------------------------------------------------------------------- what is held out


def content_of(example: dict) -> int:
    """The same for examples that are copies of each other."""
    return hash(repr((example["rows"], example.get("label"))))


def split(examples: list[dict], settings) -> tuple[list[dict], list[dict]]:
    """(to learn from, held out): the same part of every label; copies stay together."""
    piles, learn, held, dice = {}, [], [], random.Random(settings.split_seed)
    for example in examples:
        piles.setdefault(example.get("label", 0), []).append(example)
    least = min(map(len, piles.values()), default=0) if settings.balance else None
    for _, pile in sorted(piles.items()):
        dice.shuffle(pile)
        pile, copies = pile[:least], {}
        for example in pile:
            copies.setdefault(content_of(example), []).append(example)
        room = min(len(copies) - 1, max(1, round(settings.hold_out * len(pile))))
        room = 0 if settings.val else room
        for group in copies.values():
            side = held if len(group) <= room else learn
            side += group
            room -= len(group) if side is held else 0
    dice.shuffle(learn)
    dice.shuffle(held)
    return learn, held

# ------------------------------------------------------------------------------------ rows of files

TABLES = {".csv": ",;\t|", ".tsv": "\t", ".tab": "\t", "": "\t,;"}     # the first that is there
INVALID = ascii(data.INVALID)[1:-1]          # as it stands in the repr of a row

def read_rows(paths: list[str], encoding: str | None = None, columns: list[str] = (),
              notices: Notices | None = None) -> list[dict]:
    """The rows of JSON, JSON lines, parquet, .csv, .tsv and .txt files; "where" tells the place.

    columns: "text=v2" takes what stands under v2 as our "text".
    """
    notices, rows = Notices() if notices is None else notices, []
    names = read_columns(columns)
    files, told = data.find_files(paths, encoding, any_rows=True)
    notices.said += told
    named = {Path(path) for path in paths}
    other = [path for path in files if path not in named and data.kind_of(path) == "text"
             and suffix_of(path) not in (".csv", ".tsv", ".tab")]       # in a folder
    if other:
        notices.said.append(f"files left out, which have no rows: {data.shorten(other)}")
    for path in files:
        for where, row in [] if path in other else rows_of(path, encoding, names):
            if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row):
                row = {"messages": row}
            if not isinstance(row, dict):
                raise ValueError(f"{where}: an object is needed, not {row!r:.60}")
            notices[f"rows have bytes that are not {encoding or 'UTF-8'}, and became U+FFFD: "
                    "--encoding names another"] += INVALID in repr(row)
            if "where" in row:
                notices.ignore(["where"])
            rows.append({**renamed(row, names, where), "where": where})
    return rows


def read_columns(columns: list[str]) -> dict[str, str]:
    """{their name: ours} of --columns OURS=THEIRS."""
    names = {}
    for column in columns:
        ours, _, theirs = column.partition("=")
        if ours not in OURS or not theirs or theirs in names:
            raise ValueError(f"--columns {column}: OURS=THEIRS is needed, as label=v1 or text=v2")
        names[theirs] = ours
    return names


def renamed(row: dict, names: dict[str, str], where="") -> dict:
    """The row with our names for its keys: by --columns, and in any case."""
    for theirs in names:
        if theirs not in row:
            raise ValueError(f"{where} has {', '.join(row)}: no {theirs}, which --columns names")
    made = {}
    for key, value in row.items():
        lower = key.strip().lower()
        if key in names:
            made[names[key]] = value
        elif lower in names.values() or lower not in OURS or lower in row:
            made.setdefault(key, value)
        else:
            made.setdefault(lower, value)
    return made


def rows_of(path: Path, encoding: str | None, names: dict) -> list[tuple[str, dict]]:
    """(place, row) of a file, by its suffix; a table may have none."""
    if data.kind_of(path) != "text":
        return data.read_rows(path, encoding)
    with data.open_text(path, encoding) as file:
        content = file.read()
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    if suffix_of(path) == ".txt":
        return [(f"{path}, line {n}", {"text": line}) for n, line in enumerate(lines, 1)]
    delimiters = TABLES.get(suffix_of(path), "")
    delimiter = next((mark for mark in delimiters if mark in lines[0]), "")
    if not delimiters or not suffix_of(path) and (not delimiter or lines[0][:1] in ("{", "[")):
        raise ValueError(f"{path} cannot be read: take .jsonl, .json, .parquet, .csv or .tsv; .txt "
                         "for --predict")
    header = {name.strip(' "').lower() for name in lines[0].split("\t")}
    if delimiter == "\t" and len(header) == 2 and not names and not header & OURS:
        return unnamed_rows(path, lines)
    try:
        return table_rows(path, content, delimiter or delimiters[0])
    except ValueError:
        if delimiter != "\t":
            raise
    return table_rows(path, content, delimiter, csv.QUOTE_NONE)         # quotes are characters


def suffix_of(path: Path) -> str:
    """In small letters, without .gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def table_rows(path, content: str, delimiter: str, quoting=csv.QUOTE_MINIMAL):
    """[(place, row), ...] of a table whose first line has the names."""
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting,
                       strict=True)
    names, rows, begins = [], [], 1
    try:
        for fields in table:
            where, begins = f"{path}, line {begins}", table.line_num + 1
            if len(fields) < 2 and not "".join(fields).strip():         # a blank line
                continue
            if not names:
                names = [name.strip() or f"column {n}" for n, name in enumerate(fields, 1)]
                if len({*names}) < len(names):
                    raise ValueError(f"{where}: two columns have the same name: {fields}")
                continue
            while len(fields) > len(names) and not fields[-1]:
                fields.pop()
            check_width(where, fields, names, delimiter)
            rows.append((where, dict(zip(names, fields))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {begins}: {error}: a field with quotes stands in quotes, "
                         'and each of its own is written ""') from None
    return rows


def unnamed_rows(path, lines: list[str]):
    """[(place, row), ...] of label and text, in two columns without names and quotes, as in the
    SMS Spam Collection."""
    rows = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            fields = line.split("\t", 1)
            check_width(f"{path}, line {n}", fields, ["label", "text"], "\t")
            rows.append((f"{path}, line {n}", dict(zip(("label", "text"), fields))))
    return rows


def check_width(where: str, fields: list[str], names: list[str], delimiter: str) -> None:
    if len(fields) != len(names):
        raise ValueError(f"{where}: {len(fields)} fields instead of {len(names)} "
                         f"({', '.join(names)}): put a field that has {delimiter!r} into quotes")

# ------------------------------------------------------------------------------------- default rows


def definitions():
    """Yield (dotted name, node, lines of its file) of each public function and class of Python's
    standard library. Its sources are parsed; nothing is imported."""
    def inside(node, name):
        for child in node.body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(child, kinds) and not child.name.startswith("_"):
                yield f"{name}.{child.name}", child
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, f"{name}.{child.name}")
    for file, path in train.standard_library():
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if all(part.isidentifier() and part[0] != "_" for part in module.split(".")):
            with contextlib.suppress(SyntaxError, ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")                         # of old escapes
                with tokenize.open(path) as source:                     # in its own encoding
                    content = source.read()
                tree, lines = ast.parse(content), content.split("\n")   # no line ends at \f in ast
                for name, node in inside(tree, module.replace("posixpath", "os.path")):
                    yield name, node, lines


def question_rows() -> list[dict]:
    """{"instruction", "output"}: what a function does, in the first paragraph of its docstring; of
    functions with the same one the first, so that no held-out answer stands in what is learned."""
    found = {}
    for name, node, _ in definitions():
        if not isinstance(node, ast.ClassDef) and (doc := ast.get_docstring(node)):
            found.setdefault(" ".join(doc.split("\n\n")[0].split()), f"What does `{name}` do?")
    return [{"instruction": question, "output": answer}
            for answer, question in found.items() if answer]


def label_rows() -> list[dict]:
    """{"text", "label"}: docstrings, none twice, and which package they come from."""
    packages = "asyncio email http logging multiprocessing tkinter unittest xml".split()
    labels = dict(zip(packages, packages)) | {"concurrent": "multiprocessing", "urllib": "http"}
    seen = {}
    for name, node, _ in definitions():
        label, doc = labels.get(name.split(".")[0]), ast.get_docstring(node)
        if label and doc and doc.strip():
            seen.setdefault(doc.strip(), label)
    return [{"text": doc, "label": label} for doc, label in seen.items()]


def preference_rows() -> list[dict]:
    """{"prompt", "chosen", "rejected"}: a function's docstring rather than another's."""
    rows = question_rows()
    others = [row["output"] for row in rows]
    random.Random(0).shuffle(others)
    return [{"prompt": row["instruction"], "chosen": row["output"], "rejected": other}
            for row, other in zip(rows, others) if other != row["output"]]


def header_rows() -> list[dict]:
    """{"prompt"}: headers, none twice, of functions and methods that are short and would themselves
    earn the reward."""
    found = {}
    for _, node, lines in definitions():
        bodies = node.body[ast.get_docstring(node, clean=False) is not None:]
        if isinstance(node, ast.FunctionDef) and bodies:
            header = "\n".join(lines[node.lineno - 1:node.body[0].lineno - 1]) + "\n"
            body = "\n".join(lines[bodies[0].lineno - 1:node.end_lineno])
            both, length = textwrap.dedent(header + body), len(textwrap.dedent(header))
            if len(both) < 160 and code_reward(both[:length], [both[length:]], [True]) == [1.0]:
                found[both[:length]] = None
    return [{"prompt": header} for header in found]

# ----------------------------------------------------------------------------------------- rewards


class RewardError(ValueError):
    """A user's reward function failed."""


def load_reward(path: str):
    """(score, reads): score(example, completions, ended) gives the rewards of a group by reward()
    of a Python file, which is executed; reads: the keys of rows that it takes, or None for all.

    reward(prompt, completion) gives a number; it may have more parameters, named as keys of the
    row. Or as TRL has it, reward(completions, **kwargs) gives a list of numbers: it gets the group
    at once, prompts and all keys of the row as lists, and messages where the row has messages.
    """
    def failed(error):
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        frames += [error.lineno] if isinstance(error, SyntaxError) else []
        line = f", line {frames[-1]}" if frames else ""
        return RewardError(f"--reward {path}{line}: {type(error).__name__}: {error}")

    def call(*arguments, **fields):
        wanted = {name: fields[name] for name in fields if reads is None or name in reads}
        try:
            bound = signature.bind(*arguments, **wanted)
        except TypeError as error:
            raise RewardError(f"--reward {path}: reward{signature}: {error}; there are "
                              + ", ".join(["prompt", "completion", *fields])) from None
        try:
            return reward(*bound.args, **bound.kwargs)
        except (Exception, SystemExit) as error:
            raise failed(error) from None

    def score(example, completions, ended):
        fields = {name: value for name, value in example["row"].items() if name != "where"}
        prompt, size = example["prompt"], len(completions)
        if together:
            said = completions
            if any(isinstance(fields.get(key), list) for key in SHAPES):
                prompt = example["messages"]
                said = [[{"role": "assistant", "content": text}] for text in completions]
            lists = {name: [value] * size for name, value in fields.items()}
            values = call(**{**lists, "prompts": [prompt] * size, "completions": said})
        else:
            fields = {name: fields[name] for name in fields if name not in names[:2]}
            values = [call(prompt, text, **fields) for text in completions]
        try:
            rewards = [float(value) for value in values]
        except (TypeError, ValueError):
            rewards = []
        if len(rewards) != size or not all(map(math.isfinite, rewards)):
            raise RewardError(f"--reward {path} gave {values!r:.150}: rewards are finite numbers, "
                              f"one for each of {size} completions")
        return rewards
    try:
        reward = runpy.run_path(path)["reward"]
        signature = inspect.signature(reward)
    except (Exception, SystemExit) as error:                            # it can raise anything
        raise failed(error) from None
    names, together = [*signature.parameters], "completions" in signature.parameters
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    reads = None if inspect.Parameter.VAR_KEYWORD in kinds else {*names}
    return score, reads


def statements(source: str) -> set[str] | None:
    """The distinct statements of a program, but for its first and those that do nothing (`pass`, a
    constant or a name alone); None if it is not Python."""
    def works(node):
        inside = node.value if isinstance(node, ast.Expr) else node
        idle = isinstance(inside, (ast.Pass, ast.Constant, ast.Name))
        return isinstance(node, ast.stmt) and not idle
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        return {ast.dump(node) for node in ast.walk(tree)
                if works(node) and node not in tree.body[:1]}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def score_code(example: dict, completions: list[str], ended: list[bool]) -> list[float]:
    """`code_reward` of a group of completions."""
    return code_reward(example["prompt"], completions, ended)


def code_reward(prompt: str, completions: list[str], ended: list[bool]) -> list[float]:
    """1 for each completion that makes Python of the prompt, ended by itself, and has at least two
    statements that its group did not have yet; else 0."""
    rewards, seen = [], set()
    for completion, end in zip(completions, ended):
        new = (statements(prompt + completion) or set()) - seen if end else set()
        rewards.append(float(len(new) >= 2))
        seen |= new
    return rewards
