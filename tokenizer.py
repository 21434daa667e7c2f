"""Text to tokens and back, for every model of this project; BPE training; chat formats.

    load_tokenizer("out/gpt")      the tokenizer in a folder (of a checkpoint or a run) or a file
    load_tokenizer("bytes")        256 bytes and <|endoftext|>: nothing to train or download
    train_bpe(texts, 4095)         a new byte-level BPE vocabulary

Text is data: "<|eot_id|>" in a text becomes the tokens of those characters, never the control
token. Control tokens come only from `chat_parts`, which writes each model's own chat format:

    tokenizer.encode_chat([{"role": "user", "content": "Hello"}])

As a command it packs text into token files (data.py) and saves the tokenizer beside them:

    python tokenizer.py book.txt src/ 'more/*.jsonl' --out folder --vocab 8192

Sources: GPT-2's encoder.py; tiktoken; Meta's llama3 tokenizer.py and llama-models chat_format.py;
tokenization_chatglm.py of chatglm3-6b and glm-4-9b-chat; RWKV's TRIE_TOKENIZER; rustbpe (the order
of merges in training); Stanford Alpaca (its prompt).
"""
import ast
import base64
import codecs
import contextlib
import heapq
import io
import itertools
import json
import os
import pickle
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import regex                                    # tiktoken depends on it; Python's re knows no \p{L}
import tiktoken

from chat_templates import written_template
from templates import Template, choose_format, find_template

END, UNKNOWN = "<|endoftext|>", "\ufffd"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")  # as in minbpe and rustbpe
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                  r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # GLM-4's too

# GPT-2's files write a byte as a printable character: itself, or one from U+0100 on.
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
STAND_IN = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + n) for n, byte in enumerate(sorted({*range(256)} - PRINTABLE))}
BYTE_OF = {char: byte for byte, char in STAND_IN.items()}
UTF8_BYTES = sorted({*range(0xF5)} - {0xC0, 0xC1})      # UTF-8 has no others


def clean(text: str) -> str:
    """Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- tokenizers ----------------------------------------------------------------------------------

class Tokenizer:
    """What all vocabularies share.

    special_ids  name -> id of control tokens          vocab_size   highest id + 1, with added ones
    end_id       ends a document                       text_size    the same of what was not added
    bos_id       begins every text, or None            prefix_ids   begin every text (GLM has two)
    stop_ids     end a turn or a text                  model_size   tokens of the model, if fewer
    chat_format  a name in CHAT_FORMATS or None; may be set        chat_reason  why it is that
    """

    def __init__(self, tokens: dict[int, bytes], special_ids, end_id, bos_id=None, chat_format=None,
                 files=None, added=(), nfc=False):
        self.added = AddedTokens(special_ids, added, nfc)
        self._tokens = tokens | {id: name.encode() for name, id in self.added.ids.items()}
        self._files: dict[str, bytes] = files or {}  # as read: saving writes them again
        self.special_ids, self.end_id, self.bos_id = special_ids, end_id, bos_id
        self.vocab_size, self.text_size = max(self._tokens) + 1, max(tokens) + 1
        self.config, self.template, self.model_size = {}, None, None    # config: as it was read
        ends = ("<|eom_id|>", "<|eot_id|>", "<|user|>", "<|observation|>")
        self.turn_ids = {special_ids[name] for name in ends if name in special_ids}
        self.chat_format, self.chat_reason = chat_format, None
        self.template_format = None          # the chat format that the template belongs to

    @property
    def chat_format(self):
        return self._chat_format

    @chat_format.setter
    def chat_format(self, name):
        if name is not None and name not in CHAT_FORMATS:
            raise ValueError(f"chat format {name!r}: known are {', '.join(CHAT_FORMATS)} and None")
        if name and CHAT_FORMATS[name][3] not in (None, *self.special_ids):
            raise ValueError(f"chat format {name!r} needs {CHAT_FORMATS[name][3]}, which this "
                             "vocabulary lacks")
        if name == "template" and self.template is None:
            raise ValueError("chat format 'template' needs a chat template beside the tokenizer")
        if name == "template":
            self.template.end, written = self.template.find_end(self.added.ids)
            self.special_ids = self.special_ids | {mark: self.added.ids[mark] for mark in written}
            for mark in written:           # also where the vocabulary does not call them special
                self.added.tokens[mark]["special"] = True
        self._chat_format = name

    @property
    def stop_ids(self) -> tuple:
        end = self.special_ids.get(self.template.end) if self.chat_format == "template" else None
        return tuple(sorted({self.end_id, end, *self.turn_ids} - {None}))

    @property
    def prefix_ids(self) -> tuple:
        glm = [self.special_ids[s] for s in ("[gMASK]", "<sop>", "sop") if s in self.special_ids]
        return tuple(glm) if len(glm) == 2 else () if self.bos_id is None else (self.bos_id,)

    @property
    def begin_id(self) -> int | None:
        """bos_token for other programs: without one, the end of a document, as in GPT-2."""
        return self.bos_id if self.prefix_ids else self.end_id

    @property
    def pad_id(self) -> int | None:
        """The padding token for other programs: its own, else the end of a document."""
        names = (text_of(self.config.get("pad_token")), "<|finetune_right_pad_id|>")
        found = [self.special_ids[name] for name in names if name in self.special_ids]
        return next((id for id in found if id < (self.model_size or self.vocab_size)), self.end_id)

    def encode(self, text: str) -> list[int]:
        """The ids of text as data: no control token comes out, and none is added."""
        ids = []
        for piece in self.added.split(clean(text)):
            ids += [piece] if isinstance(piece, int) else self.encode_piece(piece)
        return self.fitting(ids)

    def encode_piece(self, text: str) -> list[int]:
        """The ids of text without the tokens that were added to the vocabulary."""
        raise NotImplementedError

    def fitting(self, ids: list[int]) -> list[int]:
        """ids; ValueError if one is of a token that was added, and that the model does not have."""
        if self.model_size is not None and (beyond := max(ids, default=0)) >= self.model_size:
            raise ValueError(f"{self._tokens[beyond].decode()!r} is token {beyond}, and the model "
                             f"has {self.model_size}: its tokenizer was enlarged, the model not")
        return ids

    def encode_part(self, text: str, begins=True, ends=True) -> list[int]:
        """The ids of a part of a text that was cut after a newline before a non-space."""
        return self.encode(text)

    def chat_parts(self, messages: list[dict]) -> list[tuple[list[int], bool]]:
        """[(ids, is_reply), ...] of [{"role", "content"}, ...] in the model's own chat format.

        Ends where the assistant begins to speak, or with the id that ends its turn if the last
        message is its own.
        ValueError: no chat format, or a message with a role or key that the format does not know.
        """
        if self.chat_format is None:
            raise ValueError("this tokenizer has no chat format: set tokenizer.chat_format to one "
                             f"of {', '.join(CHAT_FORMATS)}")
        render, roles, keys, _ = CHAT_FORMATS[self.chat_format]
        for n, m in enumerate(messages):
            if (not isinstance(m, dict) or not isinstance(m.get("content"), str)
                    or m.get("role") not in roles
                    or any(m[key] and key not in ("role", "content", *keys) for key in m)):
                raise ValueError(f"message {n} needs a role ({', '.join(roles)}) and content (text)"
                                 f"{' and may have ' * bool(keys)}{', '.join(keys)} in the format "
                                 f"{self.chat_format}: {m!r:.150}")
        if not messages:
            raise ValueError("a conversation needs at least one message")
        if self.chat_format == "template":
            return [(self.fitting(ids), reply)
                    for ids, reply in self.template.chat_parts(self, messages)]
        speaks = messages[-1]["role"] != "assistant"
        reply = [{"role": "assistant", "content": ""}] * speaks
        parts = [(list(self.prefix_ids), False)]
        for role, head, body in render(self, [*messages, *reply]):
            is_reply = role == "assistant"
            parts += [(head, False), (body, True)] if is_reply else [(head + body, False)]
        return [(self.fitting(ids), reply) for ids, reply in parts[:-1 if speaks else None] if ids]

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

    def saved_files(self, model_max_length: int | None = None) -> dict[str, bytes]:
        """The vocabulary in the format it was read from, and tokenizer_config.json. A chat template
        that came with it stays, unless another chat format was chosen since."""
        config = {**self.save_config(), "chat_format": self.chat_format}
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        if self.chat_format not in ("template", self.template_format):
            config.pop("chat_template", None)
        glm4 = {"persona": GLM4_PERSONA, "call": GLM4_CALL, "tools": GLM4_TOOLS}
        if "chat_template" not in config and (made := written_template(self, glm4)):
            config["chat_template"] = made
        text = json.dumps(config, ensure_ascii=False, indent=2)
        return {**self.files(), "tokenizer_config.json": text.encode()}

    def save(self, directory, model_max_length: int | None = None):
        """Writes `saved_files` into a folder."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, data in self.saved_files(model_max_length).items():
            with replacing(Path(directory, name)) as file:
                file.write(data)

    def save_config(self) -> dict:
        return self.config


class StreamDecoder:
    """Ids in, text out; the bytes of a character that is not whole yet are held back.

    All that `feed` and at the end `finish` return, joined, is what `decode` returns.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._start = tokenizer, True
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids) -> str:
        """ids: one or several."""
        ids = [ids] if isinstance(ids, int) else [int(id) for id in ids]
        data = self._tokenizer.to_bytes(ids, self._start)
        self._start = self._start and not ids
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", True)


WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B)))            # Unicode's; Python has \x1c to \x1f, too


class AddedTokens:
    """Finds the tokens that were added to a vocabulary in text, as the package `tokenizers` does.

    added: the "added_tokens" of a tokenizer.json. First those are found that are not `normalized`;
    what is between them is normalized, and then the others are found. Of those that begin at the
    same place the longest counts. `single_word`: not beside a letter or digit; `lstrip`, `rstrip`:
    with the white space beside it.
    """

    def __init__(self, special_ids: dict[str, int], added, nfc: bool):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokens = [{"content": name, "id": id, "special": True} for name, id in special_ids.items()]
        self.tokens = {token["content"]: flags | token for token in (*tokens, *added)
                       if token["content"]}
        self.ids = {name: token["id"] for name, token in self.tokens.items()}
        self.nfc, self.searches = nfc, []       # (pattern, what it finds -> token)
        for late in (False, True):
            names = {self.normalize(name) if late else name: token
                     for name, token in self.tokens.items() if token["normalized"] == late}
            pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
            self.searches.append((re.compile(pattern), names))

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def split(self, text: str, special=False):
        """Yields what text consists of: pieces of it, and ids of added tokens between them.

        special: control tokens too. Without it they are text like any other.
        """
        for piece in self.find(text, *self.searches[0], special):
            if isinstance(piece, int):
                yield piece
            else:
                yield from self.find(self.normalize(piece), *self.searches[1], special)

    def find(self, text, pattern, tokens, special):
        at = 0
        wanted = any(special or not token["special"] for token in tokens.values())
        for found in pattern.finditer(text) if wanted else ():
            token, (start, end) = tokens[found[0]], found.span()
            beside = text[max(start - 1, 0):start] + text[end:end + 1]
            if (token["special"] and not special
                    or token["single_word"] and regex.search(r"\w", beside)):
                continue
            if token["lstrip"]:
                start = at + len(text[at:start].rstrip(WHITE))
            if token["rstrip"]:
                end = len(text) - len(text[end:].lstrip(WHITE))
            if start > at:
                yield text[at:start]
            yield token["id"]
            at = end
        if at < len(text):
            yield text[at:]


class ByteBPE(Tokenizer):
    """Byte-level BPE, run by tiktoken: GPT-2, Llama 3, GLM-4, GPT-NeoX, our own.

    ranks    token -> rank, the lower merges first; ids[rank] is the id (without ids: rank)
    pattern  cuts text into pieces, each of which is merged by itself
    merges   [(left, right), ...], for saving; None: every pair that makes a token is a merge
    added    the "added_tokens" of a tokenizer.json: those not special are found in text

    tiktoken looks a whole piece up before it merges, as Llama 3 needs: 588 of its tokens cannot be
    reached by merging. Meta's code also cuts texts of 400,000 characters and runs of 25,000 spaces
    or non-spaces, which changes ids there. Like transformers, we do not (only white space of over
    50,000 characters is cut): so a text packed in parts has the ids of the whole.
    """

    RUN = 50_000  # characters: endless white space overflows the stack of tiktoken's regex engine

    def __init__(self, ranks, pattern, special_ids, end_id=None, bos_id=None, chat_format=None, *,
                 merges=None, ids=None, added=(), nfc=False, files=None):
        self._ranks, self._pattern, self._merges, self._ids = ranks, pattern, merges, ids
        if len({*ranks.values()}) < len(ranks):             # tiktoken would abort at both of these
            raise ValueError("two tokens of the vocabulary have the same id")
        if missing := [byte for byte in UTF8_BYTES if bytes([byte]) not in ranks]:
            raise ValueError(f"the vocabulary has no token for byte {missing[0]}")
        self._bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks,
                                      special_tokens={})
        tokens = {ids[rank] if ids else rank: token for token, rank in ranks.items()}
        super().__init__(tokens, special_ids, end_id, bos_id, chat_format, files, added, nfc)

    def encode_piece(self, text):
        ids, start = [], 0
        for end in range(self.RUN, len(text), self.RUN):
            if text[end - self.RUN:end].isspace():
                ids += self._bpe.encode_ordinary(text[start:end])
                start = end
        ids += self._bpe.encode_ordinary(text[start:])
        return [self._ids[id] for id in ids] if self._ids else ids

    def encode_part(self, text, begins=True, ends=True):
        # The patterns look ahead: white space is cut otherwise at the end of a text than before a
        # word. After a newline "x" is a piece of its own, and one token, in all of them.
        return self.encode(text) if ends or text[-1:] != "\n" else self.encode(text + "x")[:-1]

    def _all_merges(self):
        rank = self._ranks
        for token in sorted(rank, key=rank.get):
            pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            yield from sorted((pair for pair in pairs if pair[0] in rank and pair[1] in rank),
                              key=lambda pair: (rank[pair[0]], rank[pair[1]]))

    def files(self):
        """tokenizer.json, which transformers and `tokenizers` open to the same ids."""
        if self._files:
            return self._files
        text = {token: "".join(map(STAND_IN.get, token)) for token in self._ranks}
        merges = self._all_merges() if self._merges is None else self._merges
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        split = dict(type="Split", pattern={"Regex": self._pattern}, behavior="Isolated",
                     invert=False)
        data = dict(
            version="1.0", truncation=None, padding=None, normalizer=None, decoder=level,
            added_tokens=[*self.added.tokens.values()],
            pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]), post_processor=None,
            model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                       end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                       ignore_merges=self._merges is None,
                       vocab={text[token]: self._ids[rank] if self._ids else rank
                              for token, rank in self._ranks.items()},
                       merges=[f"{text[a]} {text[b]}" for a, b in merges]))
        return {"tokenizer.json": json.dumps(data, ensure_ascii=False).encode()}

    def save_config(self):
        name = {id: name for name, id in self.special_ids.items()}
        kept = {key: self.config[key] for key in ("eos_token", "bos_token", "chat_template")
                if key in self.config}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": name.get(self.end_id),
                "bos_token": name.get(self.begin_id), "clean_up_tokenization_spaces": False, **kept,
                "pad_token": name.get(self.pad_id)}


class Bytes(ByteBPE):
    """One id a byte, and 256 for the end of a document."""

    def __init__(self):
        ranks = {bytes([byte]): byte for byte in range(256)}
        super().__init__(ranks, GPT4_PATTERN, {END: 256}, 256, merges=[])

    def encode_piece(self, text):
        return list(text.encode())


# ---- BPE training --------------------------------------------------------------------------------


def train_bpe(texts, vocab_size: int, *, pattern=GPT4_PATTERN, progress=False,
              notices: list | None = None) -> ByteBPE:
    """Byte-level BPE from an iterable of texts: vocab_size - 256 merges, then <|endoftext|>, which
    vocab_size does not count.

    Again and again the most frequent pair of neighbours becomes a token; of equally frequent pairs
    the one with the smallest tokens. Counts are kept up to date over the distinct words (pieces of
    the split pattern), so a merge costs only the words in which it occurs. Stops when nothing is
    left to merge, and says so, in `notices` or on stderr.
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size {vocab_size}: the 256 bytes alone need 256")
    show, split, frequency = Progress(progress), regex.compile(pattern).findall, Counter()
    for n, text in enumerate(texts, 1):
        frequency.update(split(clean(text)))
        show(f"counting: {n} texts, {len(frequency)} distinct words")
    words, weights = [list(word.encode()) for word in frequency], list(frequency.values())
    counts, places = Counter(), defaultdict(set)            # of pairs; in which words each is
    for n, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += weights[n]
            places[pair].add(n)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    tokens, merges = [bytes([byte]) for byte in range(256)], []
    while len(tokens) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:              # rarer by now: back with its present count
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, changes = len(tokens), Counter()
        for n in places.pop(pair):
            old_word, words[n] = words[n], merge_word(words[n], pair, new)
            for old in zip(old_word, old_word[1:]):
                changes[old] -= weights[n]
            for now in zip(words[n], words[n][1:]):
                changes[now] += weights[n]
                if new in now:
                    places[now].add(n)
        for changed, change in changes.items():
            counts[changed] += change
            if change > 0:
                heapq.heappush(heap, (-counts[changed], changed))
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(b"".join(merges[-1]))
        show(f"merging: {len(merges)} of {vocab_size - 256}", last=len(tokens) == vocab_size)
    if len(tokens) < vocab_size:
        told = (f"nothing is left to merge after {len(merges)} merges: the vocabulary has "
                f"{len(tokens)} tokens, not {vocab_size}")
        print(told, file=sys.stderr) if notices is None else notices.append(told)
    ranks = {token: n for n, token in enumerate(tokens)}
    return ByteBPE(ranks, pattern, {END: len(tokens)}, len(tokens), merges=merges)


def merge_word(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """The word with each `pair`, from the left, replaced by `new`.

    merge_word([97, 97, 98, 97, 97, 97], (97, 97), 256) = [256, 98, 256, 97], as 256 stands for "aa"
    """
    merged, at = [], 0
    while at < len(word):
        found = word[at] == pair[0] and at + 1 < len(word) and word[at + 1] == pair[1]
        merged.append(new if found else word[at])
        at += 2 if found else 1
    return merged


class Progress:
    """A line on stderr, overwritten twice a second, if wanted or on a terminal."""

    def __init__(self, wanted):
        self.wanted, self.shown = wanted or sys.stderr.isatty(), time.time()

    def __call__(self, text, last=False):
        if self.wanted and (last or time.time() > self.shown + 0.5):
            print(f"\r{text:79}", end="\n" if last else "", file=sys.stderr, flush=True)
            self.shown = time.time()


# ---- other vocabularies --------------------------------------------------------------------------

class World(Tokenizer):
    """RWKV World: the longest token that fits, from the left. Id 0, not in the file, ends text."""

    def __init__(self, data: bytes, name: str):
        self._find, lengths = {}, defaultdict(set)              # first four bytes -> lengths to try
        for n, line in enumerate(data.rstrip().split(b"\n"), 1):
            try:
                id, literal, length = re.fullmatch(r"(\d+) (.*) (\d+)\r?", line.decode()).groups()
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else token
                if len(token) != int(length):
                    raise ValueError
            except (ValueError, SyntaxError, AttributeError, TypeError):
                raise ValueError(f"{name}, line {n}: not `id literal length`: {line[:60]!r}"
                                 ) from None
            self._find[token] = int(id)
            lengths[token[:4]].add(len(token))
        if not all(bytes([byte]) in self._find for byte in range(256)):
            raise ValueError(f"{name}: single bytes are missing in this vocabulary")
        self._lengths = {start: (*sorted(sizes, reverse=True), 3, 2, 1)
                         for start, sizes in lengths.items()}
        tokens = {id: token for token, id in self._find.items()}
        super().__init__(tokens, {}, 0, None, "world", {name: data})
        self.special_ids = {END: 0}  # its text stays U+FFFD, as in the official code
        self.added = AddedTokens(self.special_ids, (), False)
        self._blank = [id for token, id in self._find.items() if b"\n\n" in token]

    @property
    def stop_ids(self):
        return (0, *sorted(self._blank)) if self.chat_format == "world" else (0,)

    def encode_bytes(self, data: bytes) -> list[int]:
        find, lengths, ids, at, end = self._find, self._lengths, [], 0, len(data)
        while at < end:
            for length in lengths.get(data[at:at + 4], (3, 2, 1)):
                id = find.get(data[at:at + length])
                if id is not None:
                    break
            ids.append(id)
            at += length
        return ids

    def encode_piece(self, text):
        return self.encode_bytes(text.encode())


class SentencePiece(Tokenizer):
    """SentencePiece BPE: ChatGLM3, with nine control tokens after it; Llama 2, TinyLlama, Mistral.
    Each text that is encoded gets a "▁" (a space) in front, which decoding takes away. "▁" itself
    decodes to a space. chatglm: None where nothing tells; then the number of pieces does."""

    def __init__(self, data: bytes, name: str, chatglm: bool | None = True, added=()):
        try:
            import sentencepiece
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except ImportError:
            raise ImportError(f"{name} needs the package: pip install sentencepiece") from None
        except RuntimeError:
            raise ValueError(f"{name} is neither tiktoken's nor SentencePiece's format") from None
        tokens, specials = {}, {}
        for id in range(model.get_piece_size()):
            piece = model.id_to_piece(id)
            silent = model.is_control(id) or model.is_unknown(id)
            specials |= {piece: id} if silent else {}
            tokens[id] = (bytes([int(piece[3:5], 16)]) if model.is_byte(id)
                          else b"" if silent else piece.replace("▁", " ").encode())
        bos, chat, files = model.bos_id(), None, {"tokenizer.model": data}
        if chatglm or chatglm is None and len(tokens) == 64_789:
            names = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *(f"<|{r}|>" for r in GLM_ROLES))
            specials = {name: len(tokens) + n for n, name in enumerate(names)}
            bos, chat, added = None, "chatglm3", ()
        specials |= {token["content"]: token["id"] for token in added if token["special"]}
        super().__init__(tokens, specials, model.eos_id(), bos, chat, files, added)

    def encode_piece(self, text):
        return self._model.encode(text)

    def encode_part(self, text, begins=True, ends=True):
        # A newline is a byte here: nothing merges across it.
        return self.encode(text) if begins else self.encode("\n" + text)[len(self.encode("\n")):]

    def to_bytes(self, ids, start=True):
        ids = list(ids)
        data = super().to_bytes(ids)
        return data[1:] if start and ids and self._tokens.get(ids[0], b"")[:1] == b" " else data


class Characters(Tokenizer):
    """meta.pkl of nanoGPT's first example: a token for each character that its text had."""

    def __init__(self, data: bytes, name: str):
        try:
            self._find = PlainUnpickler(io.BytesIO(data)).load()["stoi"]
            tokens = {id: char.encode() for char, id in self._find.items()}
            if not all(type(id) is int and id >= 0 for id in tokens) or not tokens:
                raise ValueError("it maps no characters to numbers")
        except (pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError,
                AttributeError) as error:
            raise ValueError(f"{name} is no meta.pkl of nanoGPT, or damaged; nothing in it was "
                             f"executed: {error}") from None
        super().__init__(tokens, {}, None, files={name: data})

    def encode_piece(self, text):
        if unknown := {*text} - {*self._find}:
            raise ValueError(f"this vocabulary of {len(self._find)} characters has no "
                             f"{min(unknown)!r}")
        return [self._find[char] for char in text]


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, strings and numbers; whatever would need a class or a function raises."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# ---- reading vocabularies ------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path):
    """A new binary file that takes the place of `path` as a whole, if all goes well.

        with replacing("settings.json") as file:
            file.write(b"{}")
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path) -> dict:
    """The object in a JSON file, {} if there is no file; ValueError if it holds anything else."""
    try:
        data = json.loads(Path(path).read_bytes()) if Path(path).is_file() else {}
        return data | {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object: {error}") from None


FILES = {  # in the order they are looked for: file name -> the kinds of tokenizer that it can hold
    "tokenizer.json": ("tokenizer.json", "llama3", "llama3.1", "glm4", "glm4-0414"),
    "tokenizer.model": ("chatglm3", "llama3", "llama3.1", "glm4", "glm4-0414"),
    "vocab.json": ("gpt2",), "encoder.json": ("gpt2",),
    "rwkv_vocab_*.txt": ("world",), "20B_tokenizer.json": ("20B",), "meta.pkl": ("characters",)}
PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
VOCAB_OF = {merges: vocab for vocab, merges in PAIRS.items()}
SAME = ("tokenizer.json", "tokenizer.model", *PAIRS)  # one vocabulary spelled in several ways


def load_tokenizer(path_or_name, kind: str | None = None) -> Tokenizer:
    """The tokenizer in a folder (of a checkpoint or a run) or file, or "bytes", or "gpt2".

    kind, where files leave it open: tokenizer.json, gpt2, llama3, llama3.1, glm4, glm4-0414,
    chatglm3, world, 20B. ValueError or OSError of one line: nothing or several kinds, bad files.
    """
    path = Path(path_or_name)
    if not path.exists():
        if str(path) not in ("bytes", "gpt2"):
            raise OSError(f"{path}: no such file or folder (names are 'bytes' and 'gpt2')")
        return Bytes() if str(path) == "bytes" else download_gpt2()
    if path.suffix in (".pth", ".pt", ".safetensors", ".bin"):  # weights: look beside them
        path = path.parent
    file = find_vocabulary(path, kind) if path.is_dir() else path
    folder, config, model = path if path.is_dir() else path.parent, {}, {}
    for place in dict.fromkeys((file.parent, folder)):
        config |= read_json(place / "tokenizer_config.json")
        config |= read_json(place / "chat_template.json")               # its only key
        model |= read_json(place / "config.json") | read_json(place / "params.json")
    try:
        tokenizer = read_vocabulary(file, kind, config, model)
        template = find_template(folder, config)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{file} is damaged, or in a form that is not known: "
                         f"{type(error).__name__} {error}") from None
    tokenizer.config = config
    tokenizer.turn_ids |= {tokenizer.special_ids.get(text_of(config.get("eos_token")))} - {None}
    set_chat_format(tokenizer, template, kind)
    tokenizer.template_format = tokenizer.chat_format
    return tokenizer


def set_chat_format(tokenizer: Tokenizer, template: str | None, kind: str | None) -> None:
    """What was asked for; or what tokenizer_config.json states; or what the chat template shows."""
    config, name = tokenizer.config, {id: name for name, id in tokenizer.special_ids.items()}
    if template is not None:
        variables = {"bos_token": name.get(tokenizer.bos_id),
                     "eos_token": name.get(tokenizer.end_id),
                     "pad_token": name.get(tokenizer.pad_id)}
        variables |= {key: text_of(config[key]) for key in config if key.endswith("_token")}
        tokenizer.template = Template(template, variables)
        if not isinstance(config.get("chat_template"), list):           # of several named ones
            config["chat_template"] = template
    if kind in CHAT_FORMATS:
        tokenizer.chat_format = kind
    elif "chat_format" in config:
        tokenizer.chat_format = config["chat_format"]
    elif template is not None:
        tokenizer.chat_format, tokenizer.chat_reason = choose_format(
            tokenizer, tokenizer.template, [name for name in CHAT_FORMATS if name != "template"])


def text_of(token):
    """A token of tokenizer_config.json, which may be stated with flags: its text."""
    return token.get("content") if isinstance(token, dict) else token


def read_vocabulary(file: Path, kind: str | None, config: dict, model: dict) -> Tokenizer:
    """The tokenizer of one file, by its name and what it begins with."""
    if file.name in (*PAIRS, *VOCAB_OF):
        return read_gpt2(file.with_name(VOCAB_OF.get(file.name, file.name)), config)
    if file.suffix == ".json":
        return read_tokenizer_json(file, config, model)
    if file.suffix == ".txt":
        return World(file.read_bytes(), file.name)
    if file.suffix == ".pkl":
        return Characters(file.read_bytes(), file.name)
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read_bytes()):
        return read_tiktoken(file, kind or config.get("chat_format"), config, model)
    return read_sentencepiece(file, kind, config, model)


def names_glm(config: dict, model: dict) -> bool:
    """Whether the configs say that the model is a GLM."""
    named = [model.get("model_type"), config.get("tokenizer_class"), config.get("auto_map")]
    return "glm" in str(named).lower()


def read_sentencepiece(file: Path, kind, config: dict, model: dict) -> SentencePiece:
    """tokenizer.model of ChatGLM3, or of Llama 2 and its like: what the configs say decides."""
    glm = kind == "chatglm3" or names_glm(config, model) or (False if model or config else None)
    return SentencePiece(file.read_bytes(), file.name, glm, read_added(file.parent, config))


def read_added(folder: Path, config: dict) -> list[dict]:
    """The added tokens that stand in files beside a vocabulary, as a tokenizer.json has them."""
    stated = config.get("added_tokens_decoder") or {}
    added = {token["content"]: {**token, "id": int(id)} for id, token in stated.items()}
    special = read_json(folder / "special_tokens_map.json") | config
    named = [value for key, value in special.items() if key.endswith("_token")]
    named = [*map(text_of, named + (special.get("additional_special_tokens") or []))]
    for text, id in read_json(folder / "added_tokens.json").items():
        added.setdefault(text, {"content": text, "id": id, "special": text in named,
                                "normalized": text not in named})
    return [*added.values()]


def find_vocabulary(folder: Path, kind: str | None) -> Path:
    """The vocabulary in a folder; or beside it, as Hugging Face keeps Meta's files in original/."""
    known = sorted({k for kinds in FILES.values() for k in kinds})
    if kind not in (None, *known):
        raise ValueError(f"kind {kind!r}: known are {', '.join(known)}")
    beside = [folder.resolve().parent] if folder.resolve().name == "original" else []
    for place in (folder, folder / "original", *beside):
        found = [(file, kinds) for name, kinds in FILES.items() if kind is None or kind in kinds
                 for file in sorted(place.glob(name))]
        found = [f for n, f in enumerate(found) if n == 0 or f[0].name not in SAME]
        if len(found) > 1:
            raise ValueError(f"{place} holds {', '.join(f.name for f, _ in found)}: pass one of "
                             "them as path, or kind="
                             + " or ".join(repr(kinds[0]) for _, kinds in found))
        if found:
            return found[0][0]
    raise ValueError(f"{folder}: no vocabulary{f' of kind {kind}' if kind else ''} (looked for "
                     f"{', '.join(FILES)}); 'gpt2' and 'bytes' go by name")


def glm4_kind(model) -> str:
    return "glm4-0414" if model.get("model_type") == "glm4" else "glm4"


def read_tiktoken(file, kind, config, model) -> ByteBPE:
    """Lines "base64(token) rank". The control tokens are not in it: they depend on the model."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank)
                 for token, rank in map(bytes.split, file.read_bytes().splitlines())}
    except ValueError:
        raise ValueError(f"{file} is no tiktoken vocabulary: a line is not `base64 rank`") from None
    if kind not in ("llama3", "llama3.1", "glm4", "glm4-0414"):
        rope = model.get("rope_scaling") or model.get("rope_parameters") or {}
        scaled = rope.get("rope_type", rope.get("type")) not in (None, "default")
        kind = (glm4_kind(model) if names_glm(config, model)
                else "llama3.1" if scaled or model.get("use_scaled_rope") else "llama3")
    if kind.startswith("glm4"):
        names = [END, "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>",
                 *(f"<|{role}|>" for role in GLM_ROLES), "<|begin_of_image|>", "<|end_of_image|>",
                 "<|begin_of_video|>", "<|end_of_video|>"]
    else:
        named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
                 9: "eot_id"}
        if kind == "llama3.1":  # five that were reserved; the numbers of the others move up
            named |= {4: "finetune_right_pad_id", 5: "step_id", 8: "eom_id", 10: "python_tag",
                      11: "image"}
        number = itertools.count()
        names = [f"<|{named.get(n) or f'reserved_special_token_{next(number)}'}|>"
                 for n in range(256)]
    special = {name: len(ranks) + n for n, name in enumerate(names)}
    return ByteBPE(ranks, LLAMA3_PATTERN, special, special.get("<|end_of_text|>", special.get(END)),
                   special.get("<|begin_of_text|>"), kind)


def make_ranks(model: dict, skip, where) -> dict:
    """ranks, ids and merges for ByteBPE from vocab and merges in printable stand-ins.

    Only bytes and results of merges count (with ignore_merges all tokens), since tiktoken merges
    whatever pair makes a token. ids stays None where ids rise in the order of the merges.
    """
    try:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        made = {a + b for a, b in pairs}        # an added token may be one of them
        vocab = {text: id for text, id in model["vocab"].items()
                 if text not in skip or text in made or len(text) == 1}
        token = {text: bytes(map(BYTE_OF.__getitem__, text)) for text in vocab}
        order = dict.fromkeys([t for t in vocab if len(t) == 1] + [a + b for a, b in pairs])
        order = list(order | dict.fromkeys(vocab if model.get("ignore_merges") else ()))
        ids, merges = [vocab[text] for text in order], [(token[a], token[b]) for a, b in pairs]
        merged = [id for id, text in zip(ids, order) if len(text) > 1]
        rising = merged == sorted(merged)
        ranks = {token[text]: id if rising else n for n, (id, text) in enumerate(zip(ids, order))}
        if not ranks:
            raise ValueError("it is empty")
        return {"ranks": ranks, "ids": None if rising else ids, "merges": merges}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no byte-level BPE vocabulary: {error!r}") from None


def read_gpt2(file: Path, config: dict) -> ByteBPE:
    """vocab.json + merges.txt, or encoder.json + vocab.bpe: the same under two names."""
    vocab, added = read_json(file), read_added(file.parent, config)
    lines = file.with_name(PAIRS[file.name]).read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    special = {token["content"]: token["id"] for token in added if token["special"]}
    skip = {END, *(token["content"] for token in added)}
    end = vocab.get(END, special.get(END, max(vocab.values()) + 1))
    parts = make_ranks({"vocab": vocab, "merges": merges}, skip, file)
    return ByteBPE(pattern=GPT2_PATTERN, special_ids={END: end, **special}, end_id=end,
                   added=added, **parts)


def download_gpt2() -> ByteBPE:
    """GPT-2's vocabulary through tiktoken, which fetches it once and keeps it."""
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise OSError(f"cannot download GPT-2's vocabulary ({type(error).__name__}): put vocab.bpe "
                      "and encoder.json in a folder and pass that folder") from None
    ranks = {bpe.decode_single_token_bytes(id): id for id in range(bpe.eot_token)}
    return ByteBPE(ranks, GPT2_PATTERN, {END: bpe.eot_token}, bpe.eot_token)


def read_tokenizer_json(file, config, model) -> ByteBPE:
    """The format of Hugging Face's `tokenizers`, where it holds a byte-level BPE."""
    source = read_json(file)
    bpe, before = source.get("model") or {}, source.get("pre_tokenizer") or {}
    if bpe.get("byte_fallback") and "Ġ" not in bpe["vocab"]:
        if not (proper := file.with_name("tokenizer.model")).exists():
            raise ValueError(f"{file} is a SentencePiece vocabulary (of Llama 2, Mistral or their "
                             "like): put its tokenizer.model beside it, which is read")
        return read_sentencepiece(proper, None, config, model)
    normalizer = source.get("normalizer") or {"type": "Sequence", "normalizers": []}
    normalizers = normalizer.get("normalizers", [normalizer])
    *split, level = before.get("pretokenizers") or [before]
    pattern = split[0].get("pattern", {}).get("Regex") if split else GPT2_PATTERN
    keeps = (("Isolated", False), ("Removed", True))        # two ways to say the same of a Split
    if (level.get("type") != "ByteLevel" or level.get("add_prefix_space") or pattern is None
            or len(split) > 1 or bool(split) == level.get("use_regex", True)
            or split and (split[0].get("behavior"), split[0].get("invert")) not in keeps
            or any(part.get("type") != "NFC" for part in normalizers)):
        raise ValueError(f"{file}: no byte-level BPE with one split pattern and at most NFC")
    added = {t["content"]: t for t in source.get("added_tokens") or ()}
    special = {text: t["id"] for text, t in added.items() if t.get("special")}
    parts = make_ranks(bpe, added, file)
    only_bytes = parts["ranks"] == {bytes([byte]): byte for byte in range(256)}
    if only_bytes and special == {END: 256} and len(added) == 1:
        return Bytes()

    def named(key):
        return special.get(text_of(config.get(key)))
    end = special.get("<|end_of_text|>", special.get(END, named("eos_token")))
    bos = special.get("<|begin_of_text|>", named("bos_token"))
    chat = (glm4_kind(model) if "<sop>" in special else "llama3.1" if "<|eom_id|>" in special
            else "llama3" if "<|eot_id|>" in special else None)
    return ByteBPE(pattern=pattern, special_ids=special, end_id=end, chat_format=chat,
                   bos_id=None if bos == end else bos, added=added.values(), nfc=bool(normalizers),
                   files={"tokenizer.json": file.read_bytes()}, **parts)


# ---- chat formats --------------------------------------------------------------------------------
# Each yields (role, head, body) in ids. The body of an assistant's turn is what the model writes,
# with the id that ends the turn, which is how fine-tuning learns to stop.

def llama_chat(tokenizer, messages, strip):
    """Meta's ChatFormat. Llama 3 strips contents; 3.1 does not, and ends calls in eom."""
    special, encode = tokenizer.special_ids, tokenizer.encode
    for message, following in zip(messages, [*messages[1:], {}]):
        role = "ipython" if message["role"] == "tool" else message["role"]
        code = bool(message.get("metadata"))  # the name of a built-in tool: its call is code
        calls = (code or message.get("stop_reason") == "end_of_message"
                 or role == "assistant" and following.get("role") in ("tool", "ipython"))
        yield (role, [special["<|start_header_id|>"], *encode(role), special["<|end_header_id|>"],
                      *encode("\n\n")],
               [*([special["<|python_tag|>"]] if code else ()),
                *encode(message["content"].strip() if strip else message["content"]),
                special["<|eom_id|>" if calls else "<|eot_id|>"]])


def glm_turns(tokenizer, turns):
    """turns: [(role, metadata line, text)]. A reply ends with the id of the next role."""
    role_id, before = {role: tokenizer.special_ids[f"<|{role}|>"] for role in GLM_ROLES}, None
    for (role, line, text), (following, *_) in zip(turns, [*turns[1:], ("user",)]):
        yield (role, [] if before == "assistant" else [role_id[role]], tokenizer.encode(line)
               + tokenizer.encode(text) + ([role_id[following]] if role == "assistant" else []))
        before = role


def chatglm3_chat(tokenizer, messages):
    """build_chat_input of ChatGLM3."""
    return glm_turns(tokenizer, [
        (m["role"], f"{m.get('metadata') or ''}\n", m["content"] + (
            "\n" + json.dumps(m["tools"], indent=4, ensure_ascii=False) if m.get("tools") else ""))
        for m in messages])


GLM4_CALL = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
GLM4_PERSONA = ("你是一个名为 ChatGLM 的人工智能助手。"
                "你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
                "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具")
GLM4_TOOLS = {  # the published template's words for the built-in tools
    "python": """当你向 `python` 发送包含 Python 代码的消息时，\
该代码将会在一个有状态的 Jupyter notebook 环境中执行。
`python` 返回代码执行的输出，或在执行 60 秒后返回超时。
`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。\
不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。""",
    "simple_browser": """你可以使用 `simple_browser` 工具。该工具支持以下函数：
`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，\
可以使用 `recency_days` 参数控制搜索内容的时效性。
`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。\
选择多个角度的页面，同时尽可能选择可信任的信息来源。考虑到部分页面是无法加载的，\
你也可以多打开一些可能有用的页面而不用担心内容过多。
`open_url(url: str)`：打开指定的 URL。\n
使用 `【{引用 id}†{引用文本}】` 来引用内容。\n
操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; \
3. 根据获得的内容进行回复。在回复中应当引用信息来源。
 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。
如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。""",
    "cogview": """如果用户的请求中包含了对图像的描述，\
你可以使用 `cogview` 来生成图像并展示给用户。\
你需要向 `cogview` 发送图像描述，规则：
- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。
- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。
- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。
- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"""}


def glm4_tool(tool):
    """A tool as the template of July 2024 prints it: keys sorted, all but ASCII escaped."""
    if tool.get("type") != "function":
        if tool.get("type") not in GLM4_TOOLS:
            raise ValueError(f"tool {tool!r:.80}: known are function, {', '.join(GLM4_TOOLS)}")
        return f"\n## {tool['type']}\n\n{GLM4_TOOLS[tool['type']]}"
    text = json.dumps(tool["function"], indent=4, sort_keys=True)
    text = re.sub("[<>&']", lambda found: f"\\u{ord(found[0]):04x}", text)  # jinja's tojson
    return f"\n## {tool['function']['name']}\n\n{text}\n{GLM4_CALL}"


def glm4_chat(tokenizer, messages):
    """GLM-4 of 2024. Messages without content are skipped, as its code does; replies are not."""
    turns = []
    for m in messages:
        if m.get("tools"):
            turns.append(("system", "\n", GLM4_PERSONA + "".join(map(glm4_tool, m["tools"]))))
        if m["content"] or m["role"] == "assistant":
            turns.append((m["role"], f"{m.get('metadata') or ''}\n", m["content"]))
    return glm_turns(tokenizer, turns)


def glm4_0414_chat(tokenizer, messages):
    """GLM-4-0414: tools, then system, then the rest; thoughts of earlier replies are left out."""
    tools = [tool.get("function", tool) for m in messages for tool in m.get("tools") or ()]
    turns = [("system", "\n", "# 可用工具\n" + "\n".join(
        f"\n## {tool['name']}\n\n{json.dumps(tool, indent=4, ensure_ascii=False)}\n{GLM4_CALL}"
        for tool in tools))] if tools else []
    turns += [("system", "\n", m["content"]) for m in messages
              if m["role"] == "system" and m["content"]]
    for m in messages:
        text = m["content"].strip()
        if m["role"] == "assistant" and m is not messages[-1]:
            text = text.split("</think>")[-1].strip()
        if m["role"] != "system":
            turns.append((m["role"], f"{m['metadata']} \n" if m.get("metadata") else "\n", text))
    return glm_turns(tokenizer, turns)


def world_chat(tokenizer, messages):
    """RWKV World: a blank line ends a turn, so none may stand inside."""
    for message in messages:
        text = re.sub(r"\n+", "\n", message["content"].replace("\r\n", "\n").strip())
        role, body = message["role"].capitalize() + ":", f" {text}\n\n" if text else "\n\n"
        if role == "Assistant:":
            yield "assistant", tokenizer.encode(role), tokenizer.encode(body)
        else:
            yield message["role"], [], tokenizer.encode(role + body)


def alpaca_chat(tokenizer, messages):
    """Stanford Alpaca's prompt, for models without a format of their own; turns just follow. What
    stands between two replies is one text. A space keeps a reply apart from the colon before it:
    ":Yes" would be cut as one piece where a conversation is encoded as a whole (by other programs).
    """
    said = ""
    for message in messages:
        text, context = message["content"], message.get("input")
        if message["role"] == "user":
            text = ("Below is an instruction that describes a task"
                    + (", paired with an input that provides further context" if context else "")
                    + ". Write a response that appropriately completes the request.\n\n"
                    + f"### Instruction:\n{text}\n\n"
                    + (f"### Input:\n{context}\n\n" if context else "") + "### Response:")
        if message["role"] == "assistant":
            body = tokenizer.encode_part(text and f" {text}", begins=False)
            yield "assistant", tokenizer.encode(said), [*body, tokenizer.end_id]
            said = ""
        else:
            said += text + "\n\n" * (message["role"] == "system")


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
    "template": (None, (*GLM_ROLES, "tool", "ipython", "developer"), ("tools",), None)}  # its own


if __name__ == "__main__":
    from data import main                       # text to token files: data.py, which imports this
    main()
