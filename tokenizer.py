"""Text to token ids and back for every model here; trains BPE; packs text into token files.

    load_tokenizer("out/gpt")      the tokenizer in a folder (of a checkpoint or a run) or a file
    load_tokenizer("bytes")        256 bytes and <|endoftext|>: nothing to train or download
    train_bpe(texts, 4096)         a new byte-level BPE vocabulary

    ByteBPE         GPT-2, Llama 3, GLM-4, GPT-NeoX, our own: every byte-level BPE, run by tiktoken
    World           RWKV: the longest token that fits, from left to right
    SentencePiece   ChatGLM3, run by the sentencepiece package

Text is data. A user who types "<|eot_id|>" gets the ids of those ten characters and never the control
token: control tokens enter only by id, from `chat_parts`, which writes each model's own chat format.

    tokenizer = load_tokenizer("Meta-Llama-3-8B-Instruct")
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

On the command line it turns text into train.bin and val.bin, and saves the tokenizer beside them:

    python tokenizer.py book.txt src/ 'more/*.jsonl' --out data --vocab 8192

Sources: GPT-2's encoder.py and tiktoken (byte-level BPE), Meta's llama3/llama/tokenizer.py and
llama-models chat_format.py, tokenization_chatglm.py of chatglm3-6b and glm-4-9b-chat, RWKV's
TRIE_TOKENIZER, rustbpe (the order of merges in training), Stanford Alpaca (its prompt).
"""
import argparse
import ast
import base64
import binascii
import codecs
import collections
import glob
import hashlib
import heapq
import itertools
import json
import os
import re
import signal
import sys
import time
import unicodedata
import zlib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import tiktoken

END = "<|endoftext|>"
UNKNOWN = "\ufffd"
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")  # as in minbpe and rustbpe
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # GLM-4 has the same

# GPT-2's files write a byte as a printable character: itself, or one from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
STAND_IN = {byte: chr(byte) for byte in PRINTABLE}
STAND_IN |= {byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
BYTE_OF = {char: byte for byte, char in STAND_IN.items()}


def clean(text: str) -> str:
    """Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_file(path: Path, data: bytes):
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- chat formats: functions of tokenizer and messages that give [(ids, is_reply), ...] ----------
# An assistant turn's closing id belongs to the reply: that is how fine-tuning learns to stop.

def llama_chat(tokenizer, messages, strip):
    """Meta's ChatFormat. Llama 3 strips contents, 3.1 does not; a turn that calls a tool ends in eom."""
    special, encode = tokenizer.special_ids, tokenizer.encode

    def header(role):
        return [special["<|start_header_id|>"], *encode(role), special["<|end_header_id|>"],
                *encode("\n\n")]

    parts = [([special["<|begin_of_text|>"]], False)]
    for message, following in itertools.zip_longest(messages, messages[1:], fillvalue={}):
        role = "ipython" if message["role"] == "tool" else message["role"]
        ids = encode(message["content"].strip() if strip else message["content"])
        ends_message = (message.get("metadata") or message.get("stop_reason") == "end_of_message"
                        or following.get("role") in ("tool", "ipython"))
        if message.get("metadata"):  # the name of a built-in tool: its call is code
            ids = [special["<|python_tag|>"], *ids]
        if role == "assistant":
            end = special["<|eom_id|>" if ends_message else "<|eot_id|>"]
            parts += [(header(role), False), ([*ids, end], True)]
        else:
            parts.append(([*header(role), *ids, special["<|eot_id|>"]], False))
    return parts if role == "assistant" else [*parts, (header("assistant"), False)]


def glm_turns(tokenizer, turns):
    """GLM has no end of turn: a reply ends with the id of the next role. turns: [(role, ids), ...]"""
    role_id = {role: tokenizer.special_ids[f"<|{role}|>"] for role in GLM_ROLES}
    parts, opened = [(list(tokenizer.prefix_ids), False)], False
    for (role, ids), (following, _) in zip(turns, [*turns[1:], ("user", ())]):
        head = [] if opened else [role_id[role]]  # the reply before has drawn it already
        opened = role == "assistant"
        if opened:
            parts += [(head, False), ([*ids, role_id[following]], True)]
        else:
            parts.append((head + ids, False))
    return parts if opened else [*parts, ([role_id["assistant"]], False)]


def chatglm3_chat(tokenizer, messages):
    """build_chat_input of ChatGLM3: role, then metadata line and content, each encoded by itself."""
    turns = []
    for message in messages:
        content = message["content"]
        if message.get("tools"):
            content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
        ids = tokenizer.encode(f"{message.get('metadata') or ''}\n") + tokenizer.encode(content)
        turns.append((message["role"], ids))
    return glm_turns(tokenizer, turns)


GLM4_TOOLS = {  # what the published template says of the built-in tools
    "python": """当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。
`python` 返回代码执行的输出，或在执行 60 秒后返回超时。
`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。不要使用 `python` 进行任何网络请求或者在线 API 调用，\
这些在线内容的访问将不会成功。""",
    "simple_browser": """你可以使用 `simple_browser` 工具。该工具支持以下函数：
`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，可以使用 `recency_days` 参数控制搜索内容的时效性。
`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。选择多个角度的页面，\
同时尽可能选择可信任的信息来源。考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。
`open_url(url: str)`：打开指定的 URL。

使用 `【{引用 id}†{引用文本}】` 来引用内容。

操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; 3. 根据获得的内容进行回复。\
在回复中应当引用信息来源。
 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。
如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。""",
    "cogview": """如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。\
你需要向 `cogview` 发送图像描述，规则：
- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。
- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。
- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。
- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。""",
}
GLM4_PERSONA = ("你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
                "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具")
GLM4_CALL = "在调用上述函数时，请使用 Json 格式表示调用的参数。"


def glm4_tool(tool):
    """One tool as the template of July 2024 prints it: keys sorted, everything else \\u-escaped."""
    kind = tool.get("type")
    if kind == "function":
        text = json.dumps(tool["function"], indent=4, sort_keys=True)
        for char in "<>&'":  # jinja's tojson
            text = text.replace(char, f"\\u{ord(char):04x}")
        return f"\n## {tool['function']['name']}\n\n{text}\n{GLM4_CALL}"
    if kind not in GLM4_TOOLS:
        raise ValueError(f"tool type {kind!r}: GLM-4 knows function, {', '.join(GLM4_TOOLS)}")
    return f"\n## {kind}\n\n{GLM4_TOOLS[kind]}"


def glm4_chat(tokenizer, messages):
    """GLM-4 of 2024. Turns without content are skipped, as its code does (replies are not)."""
    turns = []
    for message in messages:
        if message.get("tools"):
            turns.append(("system", "", GLM4_PERSONA + "".join(map(glm4_tool, message["tools"]))))
        if message["content"] or message["role"] == "assistant":
            turns.append((message["role"], message.get("metadata") or "", message["content"]))
    return glm_turns(tokenizer, [(role, tokenizer.encode(f"{metadata}\n") + tokenizer.encode(text))
                                 for role, metadata, text in turns])


def glm4_0414_chat(tokenizer, messages):
    """GLM-4-0414: tools, then system, then the rest; thoughts of earlier replies are left out."""
    tools = [tool.get("function", tool) for m in messages for tool in m.get("tools") or ()]
    turns = [("system", "\n", "# 可用工具\n" + "\n".join(
        f"\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}\n{GLM4_CALL}"
        for tool in tools))] if tools else []
    turns += [("system", "\n", m["content"]) for m in messages
              if m["role"] == "system" and (m["content"] or not m.get("tools"))]
    for message in messages:
        text = message["content"].strip()
        if message["role"] == "assistant" and message is not messages[-1]:
            text = text.split("</think>")[-1].strip()
        if message["role"] != "system":
            metadata = message.get("metadata")
            turns.append((message["role"], f"{metadata} \n" if metadata else "\n", text))
    return glm_turns(tokenizer, [(role, tokenizer.encode(header) + tokenizer.encode(text))
                                 for role, header, text in turns])


def world_chat(tokenizer, messages):
    """RWKV World: a blank line ends a turn, so none may stand inside; no space after the last colon."""
    parts = []
    for message in messages:
        text = re.sub(r"\n+", "\n", message["content"].replace("\r\n", "\n").strip())
        text, role = f" {text}\n\n" if text else "\n\n", message["role"].capitalize()
        if role == "Assistant":
            parts += [(tokenizer.encode("Assistant:"), False), (tokenizer.encode(text), True)]
        else:
            parts.append((tokenizer.encode(f"{role}:{text}"), False))
    return parts if role == "Assistant" else [*parts, (tokenizer.encode("Assistant:"), False)]


def alpaca_chat(tokenizer, messages):
    """Stanford Alpaca's prompt, for models without a format of their own; turns are concatenated."""
    parts = [(list(tokenizer.prefix_ids), False)] if tokenizer.prefix_ids else []
    for message in messages:
        text, context = message["content"], message.get("input")
        if message["role"] == "assistant":
            parts.append(([*tokenizer.encode(text), tokenizer.end_id], True))
        elif message["role"] == "system":
            parts.append((tokenizer.encode(f"{text}\n\n"), False))
        else:
            parts.append((tokenizer.encode(
                "Below is an instruction that describes a task"
                + (", paired with an input that provides further context" if context else "")
                + ". Write a response that appropriately completes the request.\n\n"
                + f"### Instruction:\n{text}\n\n" + (f"### Input:\n{context}\n\n" if context else "")
                + "### Response:"), False))
    return parts


ROLES = ("system", "user", "assistant")
GLM_ROLES = (*ROLES, "observation")
CHAT_FORMATS = {  # name: (function, roles, further keys of a message, a special token it needs)
    "llama3": (partial(llama_chat, strip=True), ROLES, (), "<|eot_id|>"),
    "llama3.1": (partial(llama_chat, strip=False), (*ROLES, "tool", "ipython"),
                 ("metadata", "stop_reason"), "<|eom_id|>"),
    "chatglm3": (chatglm3_chat, GLM_ROLES, ("metadata", "tools"), "sop"),
    "glm4": (glm4_chat, GLM_ROLES, ("metadata", "tools"), "<sop>"),
    "glm4-0414": (glm4_0414_chat, GLM_ROLES, ("metadata", "tools"), "<sop>"),
    "world": (world_chat, ROLES, (), None),
    "alpaca": (alpaca_chat, ROLES, ("input",), None),
}
TURN_ENDS = ("<|eom_id|>", "<|eot_id|>", "<|user|>", "<|observation|>")


# ---- tokenizers ----------------------------------------------------------------------------------

class Tokenizer:
    """What all vocabularies share.

    special_ids  name -> id of the control tokens        vocab_size   highest id + 1, specials included
    end_id       ends a document                         bos_id       begins every text, or None
    stop_ids     end a turn or a text                    prefix_ids   begin every text (GLM: two ids)
    chat_format  a name in CHAT_FORMATS or None; may be set
    """

    def __init__(self, tokens, special_ids, end_id, bos_id=None, chat_format=None, files=None):
        self._tokens: dict[int, bytes] = tokens | {i: s.encode() for s, i in special_ids.items()}
        self._files: dict[str, bytes] = files or {}  # as they were read: saving writes them again
        self.special_ids, self.end_id, self.bos_id = special_ids, end_id, bos_id
        self.vocab_size = max(self._tokens) + 1
        self.config: dict = {}  # tokenizer_config.json as it was read
        self.turn_ids = {special_ids[name] for name in TURN_ENDS if name in special_ids}
        self.chat_format = chat_format

    @property
    def chat_format(self):
        return self._chat_format

    @chat_format.setter
    def chat_format(self, name):
        if name is not None and name not in CHAT_FORMATS:
            raise ValueError(f"chat format {name!r}: known are {', '.join(CHAT_FORMATS)} and None")
        needs = CHAT_FORMATS[name][3] if name else None
        if needs and needs not in self.special_ids:
            raise ValueError(f"chat format {name!r} needs {needs}, which this vocabulary lacks")
        self._chat_format = name

    @property
    def stop_ids(self) -> tuple:
        return tuple(sorted({self.end_id, *self.turn_ids} - {None}))

    @property
    def prefix_ids(self) -> tuple:
        glm = [self.special_ids[s] for s in ("[gMASK]", "<sop>", "sop") if s in self.special_ids]
        return tuple(glm) if len(glm) == 2 else () if self.bos_id is None else (self.bos_id,)

    def encode(self, text: str) -> list[int]:
        """The ids of text as data: no control token comes out, and none is added."""
        raise NotImplementedError

    def encode_part(self, text: str, begins=True, ends=True) -> list[int]:
        """The ids of a part of a text that was cut after a newline before a non-space."""
        return self.encode(text)

    def chat_parts(self, messages: list[dict]) -> list[tuple[list[int], bool]]:
        """[(ids, is_reply), ...] of [{"role", "content"}, ...] in the model's own chat format.

        Ends where the assistant begins to speak, or with the id that ends its turn if the last
        message is its own. The parts of a conversation are the first parts of any that goes on.
        ValueError: no chat format, or a message with a role or key that the format does not know.
        """
        if self.chat_format is None:
            raise ValueError("this tokenizer has no chat format: set tokenizer.chat_format to one "
                             f"of {', '.join(CHAT_FORMATS)}")
        render, roles, keys, _ = CHAT_FORMATS[self.chat_format]
        if not messages:
            raise ValueError("a conversation needs at least one message")
        for n, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                raise ValueError(f"message {n} is not {{'role': …, 'content': text}}: {message!r:.80}")
            if message.get("role") not in roles:
                raise ValueError(f"message {n} has role {message.get('role')!r}: {self.chat_format} "
                                 f"knows {', '.join(roles)}")
            unknown = [key for key in message if message[key] and key not in ("role", "content", *keys)]
            if unknown:
                raise ValueError(f"message {n} has {unknown[0]!r}: {self.chat_format} knows "
                                 f"{', '.join(('role', 'content', *keys))}")
        return [(ids, reply) for ids, reply in render(self, messages) if ids]

    def encode_chat(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation: the parts of `chat_parts` one after another."""
        return [id for ids, _ in self.chat_parts(messages) for id in ids]

    def to_bytes(self, ids, start=True) -> bytes:
        """The bytes of ids; control tokens as their names, ids without text as U+FFFD."""
        return b"".join(self._tokens.get(id, UNKNOWN.encode()) for id in ids)

    def decode(self, ids) -> str:
        """The text of ids; what is not valid UTF-8 becomes U+FFFD."""
        return self.to_bytes(map(int, ids)).decode("utf-8", "replace")

    def stream_decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def files(self) -> dict[str, bytes]:
        return self._files

    def save(self, directory, model_max_length: int | None = None):
        """Writes the vocabulary in the format it was read from, and tokenizer_config.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            write_file(directory / name, data)
        config = self.save_config()
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        config["chat_format"] = self.chat_format
        text = json.dumps(config, ensure_ascii=False, indent=2)
        write_file(directory / "tokenizer_config.json", text.encode())

    def save_config(self) -> dict:
        return dict(self.config)


class StreamDecoder:
    """Ids in, text out; the bytes of a character that is not whole yet are held back.

    All that `feed` and the final `finish` return, joined, is what `decode` returns.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._start = tokenizer, True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids) -> str:
        """ids: one id or several."""
        ids = [ids] if isinstance(ids, int) else [int(id) for id in ids]
        data = self._tokenizer.to_bytes(ids, self._start)
        self._start = self._start and not ids
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back, as U+FFFD."""
        return self._utf8.decode(b"", True)


class ByteBPE(Tokenizer):
    """Byte-level BPE on tiktoken.

    ranks    token -> id; a lower id merges first (ids, if given, turns these ranks into real ids)
    pattern  cuts text into pieces that are merged each by itself
    added    text -> id of added tokens that are *not* special: they are found in text
    merges   [(left, right), ...] for saving; without them a token may be a merge of any two others

    tiktoken looks a whole piece up before it merges (transformers: ignore_merges), which Llama 3
    needs: 588 of its tokens cannot be reached by merging. Meta's own code also cuts runs of 25,000
    spaces or non-spaces and texts of 400,000 characters, so it gives other ids there; we do not,
    as transformers does not, and so that a text packed in parts has the same ids as the whole.
    """

    RUN = 50_000  # characters: tiktoken's regex engine overflows its stack in endless white space

    def __init__(self, ranks, pattern, special_ids, end_id=None, *, bos_id=None, chat_format=None,
                 merges=None, ids=None, added=None, nfc=False, files=None):
        self._ranks, self._pattern, self._merges, self._ids = ranks, pattern, merges, ids
        self._added, self._nfc = added or {}, nfc
        words = sorted(self._added, key=len, reverse=True)  # of those that begin here the longest
        self._find_added = re.compile("|".join(map(re.escape, words))) if words else None
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        tokens = {ids[rank] if ids else rank: token for token, rank in ranks.items()}
        tokens |= {id: text.encode() for text, id in self._added.items()}
        super().__init__(tokens, special_ids, end_id, bos_id, chat_format, files)

    def _encode(self, text):
        ids, start = [], 0
        for at in range(0, len(text), self.RUN):
            if text[at:at + self.RUN].isspace() and at + self.RUN < len(text):
                ids += self._bpe.encode_ordinary(text[start:at + self.RUN])
                start = at + self.RUN
        ids += self._bpe.encode_ordinary(text[start:] if start else text)
        return [self._ids[id] for id in ids] if self._ids else ids

    def encode(self, text):
        text = clean(text)
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        if not self._find_added:
            return self._encode(text)
        ids, start = [], 0
        for match in self._find_added.finditer(text):
            ids += self._encode(text[start:match.start()]) + [self._added[match[0]]]
            start = match.end()
        return ids + self._encode(text[start:])

    def encode_part(self, text, begins=True, ends=True):
        # The patterns look one character ahead: white space at the end of a text is cut otherwise
        # than before a word. After a newline "x" is a piece, and one token, in all of them.
        return self.encode(text) if ends or text[-1:] != "\n" else self.encode(text + "x")[:-1]

    def _all_merges(self):
        """Every pair of tokens that makes a token, in order: what tiktoken does, written as merges."""
        for token in sorted(self._ranks, key=self._ranks.get):
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            yield from sorted((pair for pair in pairs if all(t in self._ranks for t in pair)),
                              key=lambda pair: [self._ranks[t] for t in pair])

    def files(self):
        """tokenizer.json, which transformers and `tokenizers` open to the same ids."""
        if not self._files:
            def printed(token):
                return "".join(map(STAND_IN.get, token))
            merges = self._all_merges() if self._merges is None else self._merges
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": False}
            split = {"type": "Split", "pattern": {"Regex": self._pattern}, "behavior": "Isolated",
                     "invert": False}
            data = {
                "version": "1.0", "truncation": None, "padding": None,
                "added_tokens": [{"id": id, "content": name, **flags, "special": True}
                                 for name, id in self.special_ids.items()],
                "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
                "post_processor": None, "decoder": level,
                "model": {"type": "BPE", "dropout": None, "unk_token": None,
                          "continuing_subword_prefix": None, "end_of_word_suffix": None,
                          "fuse_unk": False, "byte_fallback": False,
                          "ignore_merges": self._merges is None,
                          "vocab": {printed(token): id for token, id in self._ranks.items()},
                          "merges": [f"{printed(a)} {printed(b)}" for a, b in merges]}}
            self._files = {"tokenizer.json": json.dumps(data, ensure_ascii=False).encode()}
        return self._files

    def save_config(self):
        name = {id: name for name, id in self.special_ids.items()}
        start = name.get(self.bos_id) if self.prefix_ids else name.get(self.end_id)
        kept = {key: self.config[key] for key in ("chat_template",) if key in self.config}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name.get(self.end_id),
                "bos_token": start, "clean_up_tokenization_spaces": False, **kept}


class Bytes(ByteBPE):
    """One id a byte, and 256 for the end of a document."""

    def __init__(self):
        super().__init__({bytes([byte]): byte for byte in range(256)}, GPT4_PATTERN, {END: 256}, 256,
                         merges=[])

    def encode(self, text):
        return list(clean(text).encode())


class World(Tokenizer):
    """RWKV World: of all tokens that fit, the longest, from the left. Id 0, not in the file, ends text."""

    def __init__(self, data: bytes, name: str):
        self._find = {}
        for n, line in enumerate(data.rstrip().split(b"\n"), 1):
            try:
                id, rest = line.decode().rstrip("\r").split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token if isinstance(token, bytes) else token.encode()
                self._find[token], ok = int(id), len(token) == int(length)
            except (ValueError, SyntaxError, AttributeError):
                ok = False
            if not ok:
                raise ValueError(f"{name}, line {n}: not `id literal length`: {line[:60]!r}")
        lengths = collections.defaultdict(set)  # first two bytes -> lengths to try, the longest first
        for token in self._find:
            lengths[token[:2]].add(len(token))
        self._lengths = {start: (*sorted(sizes - {1}, reverse=True), 1) for start, sizes in lengths.items()}
        self._blank = {id for token, id in self._find.items() if b"\n\n" in token}
        if any(bytes([byte]) not in self._find for byte in range(256)):
            raise ValueError(f"{name}: not all single bytes are in this vocabulary")
        tokens = {id: token for token, id in self._find.items()}
        super().__init__(tokens, {}, 0, None, "world", {name: data})
        self.special_ids = {END: 0}  # decoding it gives U+FFFD, as the official code does

    @property
    def stop_ids(self):
        return (0, *sorted(self._blank)) if self.chat_format == "world" else (0,)

    def encode_bytes(self, data: bytes) -> list[int]:
        find, lengths, ids, at = self._find, self._lengths, [], 0
        while at < len(data):
            for length in lengths.get(data[at:at + 2], (1,)):
                id = find.get(data[at:at + length])
                if id is not None:
                    break
            ids.append(id)
            at += length
        return ids

    def encode(self, text):
        return self.encode_bytes(clean(text).encode())


class SentencePiece(Tokenizer):
    """ChatGLM3's vocabulary: SentencePiece BPE and nine control tokens after it.

    Each text that is encoded begins with "▁" (a space), which decoding takes away again. "▁" itself
    decodes to a space; every other text survives.
    """

    SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{role}|>" for role in GLM_ROLES))

    def __init__(self, data: bytes, name: str):
        try:
            import sentencepiece
        except ImportError:
            raise ImportError(f"{name} needs the sentencepiece package: pip install sentencepiece") from None
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(f"{name} is neither a tiktoken nor a SentencePiece vocabulary") from None
        tokens = {}
        for id in range(model.get_piece_size()):
            piece = model.id_to_piece(id)
            tokens[id] = (bytes([int(piece[3:5], 16)]) if model.is_byte(id)
                          else b"" if model.is_control(id) or model.is_unknown(id)
                          else piece.replace("▁", " ").encode())
        specials = {name: len(tokens) + n for n, name in enumerate(self.SPECIALS)}
        super().__init__(tokens, specials, model.eos_id(), None, "chatglm3", {"tokenizer.model": data})

    def encode(self, text):
        return self._model.encode(clean(text))

    def encode_part(self, text, begins=True, ends=True):
        # Between newlines, which are bytes here, everything is merged by itself.
        return self.encode(text) if begins else self.encode("\n" + text)[len(self.encode("\n")):]

    def to_bytes(self, ids, start=True):
        ids = list(ids)
        data = super().to_bytes(ids)
        return data[1:] if start and ids and self._tokens.get(ids[0], b"").startswith(b" ") else data


# ---- reading vocabularies ------------------------------------------------------------------------

# ---- reading vocabularies ------------------------------------------------------------------------

FILES = {  # in the order they are looked for: file name -> the kinds of tokenizer that it can hold
    "tokenizer.json": ("tokenizer.json", "llama3", "llama3.1", "glm4", "glm4-0414"),
    "tokenizer.model": ("chatglm3", "llama3", "llama3.1", "glm4", "glm4-0414"),
    "vocab.json": ("gpt2",), "encoder.json": ("gpt2",),  # with merges.txt, with vocab.bpe
    "rwkv_vocab_*.txt": ("world",),
    "20B_tokenizer.json": ("20B",),
}
SAME = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")  # one vocabulary, respelled


def load_tokenizer(path_or_name, kind: str | None = None) -> Tokenizer:
    """The tokenizer in a folder (of a checkpoint or a run) or file, or "bytes", or "gpt2".

    kind, where files leave it open: tokenizer.json, gpt2, llama3, llama3.1, glm4, glm4-0414,
    chatglm3, world, 20B. ValueError or OSError of one line: nothing found, several kinds, bad files.
    """
    path = Path(path_or_name)
    if not path.exists():
        if str(path_or_name) == "bytes":
            return Bytes()
        if str(path_or_name) == "gpt2":
            return download_gpt2()
        raise OSError(f"{path}: no such file or folder (names are 'bytes' and 'gpt2')")
    if path.suffix in (".pth", ".pt", ".safetensors", ".bin"):  # weights: beside them
        path = path.parent
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "tokenizer_config.json")
    file, kind = (find_vocabulary(folder, kind) if path.is_dir() else (path, kind))
    tokenizer = read_vocabulary(file, kind or config.get("chat_format"), config,
                                read_json(folder / "config.json") | read_json(folder / "params.json"))
    tokenizer.config = config
    if "chat_format" in config:
        tokenizer.chat_format = config["chat_format"]
    return tokenizer


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} if there is no file."""
    try:
        data = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds no JSON object")
    return data


def find_vocabulary(folder, kind):
    """(file, kind) of the one vocabulary in a folder."""
    known = sorted({k for kinds in FILES.values() for k in kinds})
    if kind is not None and kind not in known:
        raise ValueError(f"kind {kind!r}: known are {', '.join(known)}")
    found = [(file, kinds) for pattern, kinds in FILES.items() for file in sorted(folder.glob(pattern))
             if kind is None or kind in kinds]
    found = [f for n, f in enumerate(found) if f[0].name not in SAME or n == 0]
    if len(found) == 1:
        return found[0][0], kind
    if not found:
        raise ValueError(f"{folder}: no vocabulary{f' of kind {kind}' if kind else ''} "
                         f"(looked for {', '.join(FILES)}); 'bytes' needs none")
    raise ValueError(f"{folder} holds several vocabularies, {', '.join(f.name for f, _ in found)}: pass "
                     f"the file, or kind={' or '.join(repr(kinds[0]) for _, kinds in found)}")


def read_vocabulary(file: Path, kind, config, model) -> Tokenizer:
    """config: tokenizer_config.json; model: config.json and params.json of the folder."""
    data = file.read_bytes()
    named = str([model.get("model_type"), config.get("tokenizer_class"), config.get("auto_map")]).lower()
    glm = "glm4-0414" if model.get("model_type") == "glm4" else "glm4"
    if file.name in ("vocab.json", "vocab.bpe", "encoder.json", "merges.txt"):
        return read_gpt2(file.parent, *(("vocab.json", "merges.txt") if file.name in
                                        ("vocab.json", "merges.txt") else ("encoder.json", "vocab.bpe")))
    if file.suffix == ".json":
        tokenizer = read_tokenizer_json(file, data, config, glm)
        if kind in CHAT_FORMATS:
            tokenizer.chat_format = kind
        return tokenizer
    if file.suffix == ".txt":
        return World(data, file.name)
    if not re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return SentencePiece(data, file.name)
    rope = model.get("rope_scaling") or model.get("rope_parameters") or {}
    scaled = model.get("use_scaled_rope") or rope.get("rope_type", rope.get("type")) not in (None, "default")
    if kind not in ("llama3", "llama3.1", "glm4", "glm4-0414"):
        kind = glm if "glm" in named else "llama3.1" if scaled else "llama3"
    return read_tiktoken(file, data, kind)


def read_tiktoken(file, data, kind) -> ByteBPE:
    """Lines "base64(token) rank". The control tokens are not in the file: they depend on the model."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in map(bytes.split, data.splitlines())}
    except (ValueError, binascii.Error):
        raise ValueError(f"{file} is not a tiktoken vocabulary: a line is not `base64 rank`") from None
    if kind.startswith("glm4"):
        names = [END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *(f"<|{r}|>" for r in GLM_ROLES),
                 *(f"<|{side}_of_{what}|>" for what in ("image", "video") for side in ("begin", "end"))]
    else:
        fixed = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
        if kind == "llama3.1":  # names that were reserved; the numbers of the rest move up
            fixed |= {4: "finetune_right_pad_id", 5: "step_id", 8: "eom_id", 10: "python_tag", 11: "image"}
        number = itertools.count()
        names = [f"<|{fixed.get(n) or f'reserved_special_token_{next(number)}'}|>" for n in range(256)]
    special = {name: len(ranks) + n for n, name in enumerate(names)}
    return ByteBPE(ranks, LLAMA3_PATTERN, special, special.get("<|end_of_text|>", special.get(END)),
                   bos_id=special.get("<|begin_of_text|>"), chat_format=kind)


def make_ranks(vocab: dict[str, int], merges, whole: bool, where):
    """(ranks, ids, merges) for ByteBPE of a vocabulary and merges in printable stand-ins.

    Only bytes and results of merges count (whole: everything), as tiktoken merges whatever pair
    makes a token. ids is None where ids already rise in the order of the merges.
    """
    try:
        token = {text: bytes(map(BYTE_OF.__getitem__, text)) for text in vocab}
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
        order = dict.fromkeys([t for t in vocab if len(t) == 1] + [a + b for a, b in pairs])
        if whole:
            order |= dict.fromkeys(vocab)
        ids = [vocab[text] for text in order]
        merged = ids[sum(len(text) == 1 for text in order):]
        pairs = [(token[a], token[b]) for a, b in pairs]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} is not a byte-level BPE vocabulary: {error}") from None
    if merged == sorted(merged):
        return {token[text]: vocab[text] for text in order}, None, pairs
    return {token[text]: rank for rank, text in enumerate(order)}, ids, pairs


def read_gpt2(folder: Path, vocab_name, merges_name) -> ByteBPE:
    """vocab.json + merges.txt, or encoder.json + vocab.bpe: the same under two names."""
    vocab = read_json(folder / vocab_name)
    lines = (folder / merges_name).read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    special = {END: vocab.pop(END, max(vocab.values(), default=0) + 1)}
    ranks, ids, merges = make_ranks(vocab, merges, False, folder / vocab_name)
    return ByteBPE(ranks, GPT2_PATTERN, special, special[END], merges=merges, ids=ids)


def download_gpt2() -> ByteBPE:
    """GPT-2's vocabulary through tiktoken, which fetches it once and keeps it."""
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise OSError(f"cannot download GPT-2's vocabulary ({type(error).__name__}): put vocab.bpe and "
                      "encoder.json in a folder and pass that folder") from None
    ranks = {bpe.decode_single_token_bytes(id): id for id in range(bpe.eot_token)}
    return ByteBPE(ranks, GPT2_PATTERN, {END: bpe.eot_token}, bpe.eot_token)


def read_tokenizer_json(file, data, config, glm) -> ByteBPE:
    """The format of Hugging Face's `tokenizers`, where it holds a byte-level BPE."""
    source = read_json(file)
    model, before = source.get("model") or {}, source.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    level = steps[-1] if steps else {}
    if (model.get("type", "BPE") != "BPE" or level.get("type") != "ByteLevel" or len(steps) > 2
            or level.get("add_prefix_space") or (len(steps) == 2) == level.get("use_regex", True)
            or (source.get("normalizer") or {"type": "NFC"}).get("type") != "NFC"):
        raise ValueError(f"{file}: only byte-level BPE with one split pattern and no normalizer but NFC "
                         "is supported")
    pattern = steps[0].get("pattern", {}).get("Regex") if len(steps) == 2 else GPT2_PATTERN
    added = {t["content"]: t for t in source.get("added_tokens") or ()}
    vocab = {text: id for text, id in model["vocab"].items() if text not in added}
    special = {text: t["id"] for text, t in added.items() if t.get("special")}
    plain = {text: t["id"] for text, t in added.items() if not t.get("special")}
    whole = bool(model.get("ignore_merges"))
    ranks, ids, merges = make_ranks(vocab, model["merges"], whole, file)
    if not ranks or pattern is None:
        raise ValueError(f"{file}: no vocabulary or no split pattern in it")
    if not merges and not plain and ranks == {bytes([b]): b for b in range(256)} and special == {END: 256}:
        return Bytes()

    def named(key):
        value = config.get(key)
        return special.get(value.get("content") if isinstance(value, dict) else value)
    end = special.get("<|end_of_text|>", special.get(END, named("eos_token")))
    bos = special.get("<|begin_of_text|>", named("bos_token"))
    chat = (glm if "<sop>" in special else "llama3.1" if "<|eom_id|>" in special
            else "llama3" if "<|eot_id|>" in special else None)
    tokenizer = ByteBPE(ranks, pattern, special, end, bos_id=None if bos == end or chat == glm else bos,
                        chat_format=chat, merges=merges, ids=ids, added=plain,
                        nfc=bool(source.get("normalizer")), files={"tokenizer.json": data})
    tokenizer.turn_ids |= {named("eos_token")} - {None}
    return tokenizer


# ---- training BPE --------------------------------------------------------------------------------

def train_bpe(texts, vocab_size: int, *, pattern=GPT4_PATTERN, progress=False) -> ByteBPE:
    """Byte-level BPE from an iterable of texts: vocab_size - 256 merges and then <|endoftext|>.

    Again and again the most frequent pair of neighbours becomes a token; of equally frequent pairs
    the one with the smallest ids. Counts are kept up to date over the distinct pieces of the texts,
    so a merge costs only the pieces it touches. Stops early, and says so, when nothing is left.
    """
    import regex  # tiktoken depends on it; Python's re knows no \p{L}
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size}: the 256 bytes alone need 256")
    show, split, frequency = Progress(progress), regex.compile(pattern).findall, collections.Counter()
    for n, text in enumerate(texts):
        frequency.update(split(clean(text)))
        show(f"counting: {n + 1} texts, {len(frequency)} distinct pieces")
    words, weights = [list(piece.encode()) for piece in frequency], list(frequency.values())
    counts, places = collections.Counter(), collections.defaultdict(set)
    for n, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[n]
            places[pair].add(n)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens, merges = [bytes([byte]) for byte in range(256)], []
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # it became rarer since it was pushed
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        changes = collections.Counter()
        for n in places.pop(pair):
            merge_word(words[n], pair, len(tokens), weights[n], n, changes, places)
        for changed, change in changes.items():
            counts[changed] += change
            if change > 0:
                heapq.heappush(heap, (-counts[changed], changed))
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(b"".join(merges[-1]))
        show(f"merging: {len(merges)} of {vocab_size - 256}")
    show.end()
    if len(tokens) < vocab_size:
        print(f"train_bpe: nothing is left to merge after {len(merges)} merges; the vocabulary has "
              f"{len(tokens)} entries, not {vocab_size}", file=sys.stderr)
    return ByteBPE({token: id for id, token in enumerate(tokens)}, pattern, {END: len(tokens)},
                   len(tokens), merges=merges)


def merge_word(word, pair, new, weight, n, changes, places):
    """Replaces pair by new in word (number n, weight times in the texts), in place."""
    for old in zip(word, word[1:]):
        changes[old] -= weight
    at = 0
    while at < len(word) - 1:
        if word[at] == pair[0] and word[at + 1] == pair[1]:
            word[at:at + 2] = [new]
        at += 1
    for now in zip(word, word[1:]):
        changes[now] += weight
        if new in now:
            places[now].add(n)


class Progress:
    """One line on stderr that overwrites itself twice a second, if wanted or if it is a terminal."""

    def __init__(self, wanted):
        self.wanted, self.last, self.width = wanted or sys.stderr.isatty(), time.time(), 0

    def __call__(self, text):
        if self.wanted and time.time() - self.last > 0.5:
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.last, self.width = time.time(), len(text)

    def end(self):
        if self.width:
            print(file=sys.stderr)


# ---- packing -------------------------------------------------------------------------------------

HEADER = 512  # bytes: one line of JSON, padded with spaces
PIECE = 2 << 20  # bytes read, and characters encoded, at a time
HOLD = 16 * PIECE  # characters kept while no place to cut is found


def find_files(data: list[str]) -> list[tuple[str, Path]]:
    """[(name, path), ...] sorted by name: the files that `data` (files, folders, globs) means.

    Names are relative to the folder, with forward slashes; held-out documents are drawn by them. A
    named file is always taken; in folders and globs hidden and binary files (a NUL byte in the first
    8 KB) are left out. ValueError: an input that gives nothing.
    """
    found = {}
    for entry in map(str, data):
        root = Path(entry)
        if root.is_file():
            here = [(root.name, root)]
        elif root.is_dir():
            here = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*")]
        else:
            here = [(Path(match).as_posix(), Path(match)) for match in glob.glob(entry, recursive=True)]
        if not root.is_file():
            here = [(name, path) for name, path in here if path.is_file() and not is_binary(path)
                    and not any(part.startswith(".") and part not in (".", "..")
                                for part in name.split("/"))]
        if not here:
            raise ValueError(f"{entry}: no text files there" if root.exists() else
                             f"{entry}: no such file or folder, and no file matches it")
        for name, path in here:
            other = found.get(name)
            if other and other.resolve() != path.resolve():
                name = path.as_posix()
            found[name] = path
    return sorted(found.items())


def is_binary(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"\0" in file.read(8192)


def decode_counted(decode, data: bytes, before=b"", **final):
    """(text, number of invalid sequences replaced); before: the bytes just before data."""
    text = decode(data, **final)
    return text, text.count(UNKNOWN) - (before + data).count(UNKNOWN.encode())


def read_documents(path: Path, name: str):
    """Yields (document name, text, invalid UTF-8 sequences replaced).

    A .jsonl has a document a line, under "text", called name:line. Any other file is one document,
    in pieces of a few MB under one name, so that it may be larger than memory. Pieces are cut after a
    newline before a non-space: `encode_part` gives exactly the ids of the whole for all our kinds
    (without such a place in 32 M characters the cut is anywhere, and a token there may differ).
    """
    if Path(path).suffix == ".jsonl":
        yield from read_jsonl(path, name)
        return
    decode, held, tail, invalid, first = codecs.getincrementaldecoder("utf-8")("replace").decode, "", b"", 0, True
    with open(path, "rb") as file:
        while True:
            data = file.read(PIECE)
            text, bad = decode_counted(decode, data, tail, final=not data)
            held, tail, invalid = held + text, (tail + data)[-2:], invalid + bad
            cut = 0 if 0 < len(data) < PIECE else find_cut(held) if data else len(held)
            if cut or first and not data or len(held) > HOLD:
                cut = cut or len(held)
                yield name, held[:cut], invalid
                held, invalid, first = held[cut:], 0, False
            if not data:
                return


def find_cut(text: str) -> int:
    """The last place after a newline and before a non-space, 0 if there is none."""
    at = text.rfind("\n", 0, max(len(text) - 1, 0))
    while at >= 0 and text[at + 1].isspace():
        at = text.rfind("\n", 0, at)
    return at + 1


def read_jsonl(path, name):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line, invalid = decode_counted(partial(bytes.decode, errors="replace"), line.strip(b"\xef\xbb\xbf\r\n "))
            if not line:
                continue
            try:
                text = json.loads(line)["text"]
                clean_text = clean(text)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ValueError(f"{path}, line {number}: not a JSON object with a string \"text\"") from None
            yield f"{name}:{number}", clean_text, invalid + (clean_text != text)


def held_out(name: str, seed: int) -> bool:
    """Whether a document of this name belongs to the 5 % for validation."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < 0.05 * 2 ** 64


def document_names(files):
    """The names of all documents, without reading texts."""
    for name, path in files:
        if path.suffix == ".jsonl":
            with open(path, "rb") as file:
                yield from (f"{name}:{n}" for n, line in enumerate(file, 1) if line.strip())
        elif path.stat().st_size:
            yield name


def splits_by_document(files, seed) -> bool:
    """False with fewer than 20 documents, or if none or all would be held out."""
    held = 0
    for count, name in enumerate(document_names(files), 1):
        held += held_out(name, seed)
        if count >= 20 and 0 < held < count:
            return True
    return False


def split_documents(files, seed=0):
    """Yields (split, text, begins, ends, invalid) for the pieces of all documents, in order.

    split is "train" or "val": by `held_out`; where there are too few documents for that, "val" is the
    last tenth of each (in bytes, cut between characters).
    """
    by_document = splits_by_document(files, seed)
    for name, path in files:
        for document, pieces in itertools.groupby(read_documents(path, name), key=itemgetter(0)):
            left, begun = None, set()
            for (_, text, invalid), following in pairwise_to_end(pieces):
                data = text.encode()
                if left is None:
                    size = len(data) if path.suffix == ".jsonl" else path.stat().st_size
                    left = size - size // 10  # bytes that are still for training
                    if by_document:
                        left = 0 if held_out(document, seed) else float("inf")
                head = text if len(data) <= left else data[:left].decode("utf-8", "ignore")
                last = following is None
                for split, part, ends in (("train", head, last or left <= len(data)),
                                          ("val", text[len(head):], last)):
                    if part or not text and (split == "val") == (left == 0 and by_document):
                        yield split, part, split not in begun, ends, invalid
                        begun.add(split)
                        invalid = 0
                left = max(left - len(data), 0)


def pairwise_to_end(items):
    """(item, the next one) for each, and (the last, None)."""
    items = iter(items)
    item = next(items, None)
    while item is not None:
        following = next(items, None)
        yield item, following
        item = following


def pack(files, tokenizer: Tokenizer, directory, split_seed=0, workers=None, progress=False) -> dict:
    """Turns files (of `find_files`) into directory/train.bin and val.bin, on several processes.

    Each document is followed by tokenizer.end_id; documents keep their order, and the files are the
    same for any number of workers (None: a core for each 8 MB). Both appear whole or not at all.
    Returns {"train": {"documents", "bytes" of UTF-8, "tokens", "invalid", "empty"}, "val": ...}.
    ValueError: no text at all.
    """
    if tokenizer.end_id is None:
        raise ValueError("this tokenizer has no token that ends a document")
    directory, total = Path(directory), sum(path.stat().st_size for _, path in files) or 1
    directory.mkdir(parents=True, exist_ok=True)
    workers = workers or min(os.cpu_count() or 1, 1 + total // (8 << 20))
    stats = {split: dict.fromkeys(("documents", "bytes", "tokens", "invalid", "empty"), 0)
             for split in ("train", "val")}
    show, start = Progress(progress), time.time()
    writers = {split: TokenWriter(directory / f"{split}.bin", tokenizer.vocab_size) for split in stats}
    try:
        for split, ids in encode_all(batches(files, split_seed, stats), tokenizer, workers):
            writers[split].add(ids)
            done, passed = sum(s["bytes"] for s in stats.values()), time.time() - start
            show(f"packing: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {done / 1e6 / passed:.1f} MB/s, "
                 f"{max(total - done, 0) / done * passed:.0f} s left")
        show.end()
        for split, writer in writers.items():
            stats[split]["tokens"] = writer.count
        if not any(s["documents"] for s in stats.values()):
            raise ValueError("no text in " + ", ".join(str(path) for _, path in files[:3])
                             + (" …" if len(files) > 3 else ""))
        for split, writer in writers.items():
            writer.finish(stats[split]["documents"], stats[split]["bytes"])
        for writer in writers.values():
            os.replace(writer.temporary, writer.path)
    finally:
        for writer in writers.values():
            writer.file.close()
            writer.temporary.unlink(missing_ok=True)
    return stats


def batches(files, seed, stats):
    """Yields (split, [(text, begins, ends), ...]) of about PIECE characters, and counts in stats."""
    waiting, sizes = {"train": [], "val": []}, collections.Counter()
    for split, text, begins, ends, invalid in split_documents(files, seed):
        count = stats[split]
        count["bytes"] += len(text.encode())
        count["invalid"] += invalid
        count["documents" if text else "empty"] += ends
        if text:
            waiting[split].append((text, begins, ends))
            sizes[split] += len(text)
        if sizes[split] >= PIECE:
            yield split, waiting[split]
            waiting[split], sizes[split] = [], 0
    yield from ((split, parts) for split, parts in waiting.items() if parts)


def encode_all(jobs, tokenizer, workers):
    """(split, ids) for each job, in order; no more jobs wait than keep the workers busy."""
    if workers == 1:
        yield from ((split, encode_parts(parts, tokenizer)) for split, parts in jobs)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer,)) as pool:
        pending = collections.deque()
        for split, parts in jobs:
            pending.append((split, pool.submit(encode_parts, parts)))
            if len(pending) > 2 * workers:
                split, future = pending.popleft()
                yield split, future.result()
        for split, future in pending:
            yield split, future.result()


def start_worker(tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    encode_parts.tokenizer = tokenizer  # sent once, not with each job


def encode_parts(parts, tokenizer=None):
    """The ids of texts, each document followed by end_id, as one array."""
    tokenizer, ids = tokenizer or encode_parts.tokenizer, []
    for text, begins, ends in parts:
        ids += tokenizer.encode_part(text, begins, ends)
        if ends:
            ids.append(tokenizer.end_id)
    return np.array(ids, dtype=np.uint32)


class TokenWriter:
    """A token file in the making: a header of 512 bytes, then ids, little-endian uint16 or uint32."""

    def __init__(self, path: Path, vocab_size: int):
        self.path, self.temporary = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.vocab_size, self.count, self.crc = vocab_size, 0, 0
        self.dtype = "uint16" if vocab_size <= 65536 else "uint32"
        self.file = open(self.temporary, "wb")
        self.file.write(b" " * HEADER)

    def add(self, ids: np.ndarray):
        if len(ids) and int(ids.max()) >= self.vocab_size:
            raise ValueError(f"id {ids.max()} in a vocabulary of {self.vocab_size}")
        data = ids.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
        self.count, self.crc = self.count + len(ids), zlib.crc32(data, self.crc)
        self.file.write(data)

    def finish(self, documents: int, size: int):
        header = {"format": "tokens-1", "dtype": self.dtype, "vocab_size": self.vocab_size,
                  "tokens": self.count, "documents": documents, "bytes": size, "crc32": self.crc}
        self.file.seek(0)
        self.file.write(json.dumps(header).ljust(HEADER - 1).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def open_tokens(path, vocab_size: int | None = None, headerless=False) -> tuple[np.ndarray, dict]:
    """(ids as a memory map, header) of a token file, after checking format, size and checksum.

    headerless: nanoGPT's train.bin, uint16 and nothing else. ValueError or OSError: it is no such
    file, it is damaged, or its vocabulary is larger than vocab_size.
    """
    path = Path(path)
    size = path.stat().st_size
    if headerless:
        header, start = {"format": "headerless", "dtype": "uint16", "tokens": size // 2}, 0
        expected = size // 2 * 2
    else:
        with open(path, "rb") as file:
            first = file.read(HEADER)
        try:
            header = json.loads(first)
            width = {"uint16": 2, "uint32": 4}[header["dtype"]]
            start, expected = HEADER, HEADER + width * header["tokens"]
            if header["format"] != "tokens-1" or not {"vocab_size", "crc32"} <= header.keys():
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no token file of ours (nanoGPT's need headerless=True)") from None
    if size != expected:
        raise ValueError(f"{path} has {size} bytes instead of {expected}: it is cut off or damaged")
    dtype = np.dtype(header["dtype"]).newbyteorder("<")
    if not header["tokens"]:
        return np.zeros(0, dtype), header
    ids = np.memmap(path, dtype, "r", offset=start, shape=(header["tokens"],))
    crc, highest, step = 0, 0, 4 << 20
    for at in range(0, len(ids), step):
        block = ids[at:at + step]
        crc, highest = zlib.crc32(block, crc), max(highest, int(block.max()))
    if not headerless and crc != header["crc32"]:
        raise ValueError(f"{path} is damaged: its checksum does not match")
    needed = header.setdefault("vocab_size", highest + 1)
    if vocab_size is not None and needed > vocab_size:
        raise ValueError(f"{path} was made with a vocabulary of {needed}, not {vocab_size}: pack the text "
                         "again with this tokenizer")
    return ids, header


# ---- command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def main():
    parser = Parser(description="Packs text into token files: train.bin and val.bin.")
    parser.add_argument("data", nargs="+", metavar="DATA", help="text or .jsonl files, folders, globs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the result")
    parser.add_argument("--tokenizer", metavar="NAME_OR_PATH", help="bytes, gpt2, a file or a folder; "
                        "without it a new one is trained on the text")
    parser.add_argument("--vocab", type=int, metavar="N", help="size of the new vocabulary (4096)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (as many as pay)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice what is held out (0)")
    args = parser.parse_args()
    if args.tokenizer and args.vocab:
        parser.error("--vocab is for a new vocabulary: leave it or --tokenizer out")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1")
    try:
        files = find_files(args.data)
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
        else:
            texts = (text for split, text, *_ in split_documents(files, args.seed) if split == "train")
            tokenizer = train_bpe(texts, (args.vocab or 4096) - 1, progress=True)
        stats = pack(files, tokenizer, args.out, args.seed, args.workers, progress=True)
        tokenizer.save(args.out)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    for split, s in stats.items():
        print(f"{split}: {s['documents']} documents, {s['bytes']:,} bytes, {s['tokens']:,} tokens, "
              f"{s['invalid']} invalid UTF-8 sequences, {s['empty']} empty documents")


if __name__ == "__main__":
    main()
