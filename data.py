"""Files -> documents -> token files: the text that train.py learns, and the rows of finetune.py.

    files, notices = find_files(["book.txt", "src/", "more/*.jsonl.gz"])
    tokenizer = train_bpe(sample(files), 4095)
    pack(files, tokenizer, "folder")                    # train.bin and val.bin
    tokens, header = open_tokens("folder/train.bin")

A document is an iterable of strings, its text in pieces, and can be read again: a list, or a
`TextFile`, which may be larger than memory. Bytes that are not text are lone surrogates in it until
`clean` of tokenizer.py makes U+FFFD of them. Notices tell what was left out or replaced.
"""
import array
import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import signal
import time
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from flags import Parser, number
from tokenizer import UNKNOWN, Progress, clean, load_tokenizer, replacing, train_bpe

PIECE = 2 << 20         # characters that are read, and encoded, at a time
HOLD = 16 * PIECE       # characters that are held while there is no place to cut them
HEADER = 512            # bytes of a token file before its tokens: JSON, padded with spaces

# ---- files ---------------------------------------------------------------------------------------


def find_files(data, encoding=None, any_rows=False) -> tuple[list[Path], list[str]]:
    """(files, notices): the files that `data` (files, folders, patterns) means, each of them once.

    Sorted by their names inside the folder. Folders and patterns leave out hidden files and, with a
    notice, those that are not text or (unless any_rows) have rows without "text"; links are
    followed. ValueError: nothing is left, or a named file is not text.
    """
    found = {}                                          # real path -> (name, path, objection)
    for entry in map(Path, data):
        paths = list(list_files(entry, set()))
        if not paths:
            raise ValueError(f"{entry}: no such file or folder, or no files in it")
        for path in paths:
            name = path.relative_to(entry).as_posix() if entry.is_dir() else path.name
            reason = objection(path, encoding, any_rows or path == entry)
            if reason and path == entry:
                raise ValueError(f"{path}: {reason}")
            found.setdefault(os.path.realpath(path), (name, path, reason))
    files = [path for _, path, reason in sorted(found.values()) if not reason]
    left_out = sorted((reason.split(":")[0], name) for name, _, reason in found.values() if reason)
    told = [f"{reason}: {shorten([name for other, name in left_out if other == reason])}"
            for reason in dict(left_out)]
    notice = f"{len(left_out)} of {len(found)} files left out: {'; '.join(told)}"
    if not files:
        raise ValueError(f"no text: {notice}")
    return files, [notice] if left_out else []


def list_files(entry: Path, walked: set):
    """Yields a file, or what matches a pattern, or the files of a folder that are not hidden.

    Links are followed, into each real folder once.
    """
    if not os.path.lexists(entry):
        matches = map(Path, glob.glob(str(entry), recursive=True))
        yield from (path for path in matches if not path.is_dir())
    elif not entry.is_dir():
        yield entry
    elif os.path.realpath(entry) not in walked:
        walked.add(os.path.realpath(entry))
        for path in sorted(entry.iterdir()):
            if not path.name.startswith("."):
                yield from list_files(path, walked)


def objection(path: Path, encoding, any_rows) -> str:
    """Why a file cannot be used, by its beginning: "reason: what to do"; else ""."""
    try:
        if not path.is_file():
            return "not a file: it is a broken link, a pipe or a device"
        if kind_of(path) != "parquet":
            with open_text(path, encoding) as file:
                text = file.read(1 << 20)
            if "\0" in text:
                return "binary: convert it to text, or name its encoding: --encoding utf-16-le"
            if 100 * text.count(INVALID) > len(text):
                return f"not {encoding or 'UTF-8'}: name its encoding, as in --encoding gb18030"
        if kind_of(path) != "text":
            next(read_rows(path, encoding) if any_rows else read_documents(path, encoding), None)
    except ImportError:
        return "needs pyarrow: pip install pyarrow"
    except (ValueError, OSError, LookupError) as error:
        return f"unreadable: {error}"
    return ""


def shorten(names) -> str:
    """a, b, c and 7 more"""
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")


# ---- documents -----------------------------------------------------------------------------------

INVALID = "\udc80"      # in text as it is read: an invalid sequence of bytes
codecs.register_error("mark", lambda error: (INVALID, error.end))

MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le",            # UTF-32 first
         codecs.BOM_UTF32_BE: "utf-32-be", codecs.BOM_UTF16_LE: "utf-16-le",
         codecs.BOM_UTF16_BE: "utf-16-be"}
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".json": "json",
         ".parquet": "parquet"}


def kind_of(path: Path) -> str:
    """The kind, by the name without .gz: "lines" (JSON lines), "json", "parquet" or "text"."""
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix, "text")


@contextlib.contextmanager
def open_text(path: Path, encoding: str | None = None, start=0):
    """A file as text: unzipped, in the encoding of its byte order mark, else in `encoding` (UTF-8).

    Line ends stay as they are. start: begin with the first line after that byte.
    """
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            begins = file.read(4)
            mark = next((mark for mark in MARKS if begins.startswith(mark)), b"")
            file.seek(start or len(mark))
            encoding = MARKS.get(mark, encoding or "utf-8")
            text = io.TextIOWrapper(file, encoding, "mark", newline="\n")
            while start and (line := text.readline(PIECE)) and not line.endswith("\n"):
                pass
            yield text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


class TextFile:
    """The text of a file as one document, in pieces of a few MB.

    They are cut after a newline before a non-space, where `encode_part` gives the tokens of the
    whole (if there is no such place in 32 M characters, anywhere: a token may differ there).
    """

    def __init__(self, path: Path, encoding: str | None = None, start=0):
        self.path, self.encoding, self.start = path, encoding, start

    def __iter__(self):
        held = ""
        with open_text(self.path, self.encoding, self.start) as file:
            while text := file.read(PIECE):
                held += text
                cut = find_cut(held) or (len(held) if len(held) > HOLD else 0)
                if cut:
                    yield held[:cut]
                    held = held[cut:]
        if held:
            yield held


def find_cut(text: str) -> int:
    """The last place after a newline and before a non-space, 0 if there is none."""
    at = text.rfind("\n", 0, max(len(text) - 1, 0))
    while at >= 0 and text[at + 1].isspace():
        at = text.rfind("\n", 0, at)
    return at + 1


def read_rows(path: Path, encoding: str | None = None, start=0):
    """Yields (place, row) of JSON, JSON lines or parquet; place: for messages, "a.jsonl, line 3".

    A .json is a list of rows, {"data": [rows]} or one row, over any number of lines; or JSON lines.
    """
    if kind_of(path) == "parquet":
        from pyarrow.parquet import ParquetFile
        rows = (row for batch in ParquetFile(path).iter_batches(1024) for row in batch.to_pylist())
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
        return
    with open_text(path, encoding, start) as file:
        lines = ((f"{path}, line {n}", parse_json(line, path, n))
                 for n, line in enumerate(file, 1) if line.strip("\ufeff \t\r\n"))
        first = []
        if kind_of(path) == "json":
            with contextlib.suppress(ValueError):           # a value over several lines
                first = list(itertools.islice(lines, 2))
        if kind_of(path) == "json" and len(first) < 2:
            file.seek(0)
            value = parse_json(file.read(), path)
            rows = value.get("data", value) if isinstance(value, dict) else value
            rows = enumerate(rows if isinstance(rows, list) else [value], 1)
            yield from ((f"{path}, row {n}", row) for n, row in rows)
        else:
            yield from itertools.chain(first, lines)


def parse_json(text: str, path: Path, line=1):
    try:
        return json.loads(text.strip("\ufeff").rstrip())
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{path}, line {line}: not JSON: {getattr(error, 'msg', error)}") from None


def read_documents(path: Path, encoding: str | None = None, start=0):
    """Yields the documents of a file: the "text" of each row, or all of a text file."""
    if kind_of(path) == "text":
        yield TextFile(path, encoding, start)
    else:
        for place, row in read_rows(path, encoding, start):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{place}: not a JSON object with a string "text"')
            yield [row["text"]] if row["text"] else []


def all_documents(files, encoding=None):
    """Yields (path, document) of all files."""
    for path in files:
        yield from ((path, document) for document in read_documents(path, encoding))


# ---- what is held out ----------------------------------------------------------------------------


def held_out(document, seed=0) -> bool:
    """Whether a document is one of the 5 % for validation: a hash of how it begins decides.

    So equal documents stay together and a file that moves keeps its side. 65,536 characters are
    enough, and that much is known without reading a large file twice.
    """
    begins = ""
    for piece in document:
        begins += piece
        if len(begins) >= 65536:
            break
    text = f"{seed}/{begins[:65536]}"
    hashed = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(hashed.digest(), "big") < 0.05 * 2 ** 64


def splits_by_document(files, encoding=None, seed=0) -> bool:
    """Whether there are 20 documents, none counted twice, of which some are held out, some not."""
    sides = {}
    for _, document in all_documents(files, encoding):
        if first := next(iter(document), ""):
            sides[first] = held_out(document, seed)
        if len(sides) >= 20 and len({*sides.values()}) == 2:
            return True
    return False


def split_document(document, by_document: bool, seed=0) -> dict:
    """{"train": pieces, "val": pieces}: all of it on one side, or its last tenth in "val"."""
    if by_document:
        return {"val" if held_out(document, seed) else "train": document}
    size = sum(map(len, document))
    cut = size - size // 10
    return {"train": between(document, 0, cut), "val": between(document, cut, size)}


def between(document, start: int, end: int):
    """Yields the pieces of text[start:end], where text is the whole document."""
    at = 0
    for piece in document:
        if part := piece[max(start - at, 0):max(end - at, 0)]:
            yield part
        at += len(piece)


def sample(files, encoding=None, seed=0, limit=64 << 20, whole=False):
    """Yields text of the training part for `train_bpe`: all of it, if the files are below `limit`.
    whole: nothing of these files is held out.

    Of more it reads about as much: blocks of PIECE bytes, evenly spread over all files. (Of a .gz,
    .json or .parquet its beginning. The last tenth of a text is counted in bytes here.)
    """
    by_document = not whole and splits_by_document(files, encoding, seed)
    number = itertools.count()
    sizes = {path: path.stat().st_size for path in files}
    every = max(1, -(-sum(sizes.values()) // limit))        # one block of so many is read
    for path, size in sizes.items():
        starts, room = [at for at in range(0, size, PIECE) if next(number) % every == 0], PIECE
        if every == 1 or path.suffix.lower() == ".gz" or kind_of(path) in ("json", "parquet"):
            starts, room = starts[:1], room * len(starts)   # one part, from the beginning on
        for start in starts:
            if every > 1 and kind_of(path) == "text":       # a part of one document
                learnt = whole or (not held_out(TextFile(path, encoding), seed) if by_document
                                   else start + room < 0.9 * size)
                texts = TextFile(path, encoding, start) if learnt else []
            else:
                texts = (piece for document in read_documents(path, encoding, start)
                         for piece in (document if whole else split_document(
                             document, by_document, seed).get("train", ())))
            yield from take(texts, room)


def take(texts, room: int):
    """Yields texts until they have `room` characters; the last may be cut."""
    for text in texts:
        yield text[:room]
        room -= len(text)
        if room <= 0:
            break


# ---- token files ---------------------------------------------------------------------------------


def pack(files, tokenizer, directory, split_seed=0, encoding=None, workers=None, progress=False,
         val=()):
    """Turns files (of `find_files`) into directory/train.bin and val.bin, on several processes.

    Each document is followed by tokenizer.end_id; documents keep their order, and the result is the
    same for any number of workers (None: one for each 8 MB, at most a core each). val: files to
    validate on; then nothing of `files` is held out. Both token files appear whole or not at all.
    Returns {"train": {"documents", "bytes" (of UTF-8), "tokens"}, "val": ..., "notices": [...]}.
    ValueError: no text at all, or a file with more than 1 % of invalid text.
    """
    if tokenizer.end_id is None:
        raise ValueError("this tokenizer has no token that ends a document")
    Path(directory).mkdir(parents=True, exist_ok=True)
    total = sum(path.stat().st_size for path in [*files, *val])
    workers = workers or min(os.cpu_count() or 1, 1 + total // (8 << 20))
    seen, hashes, show, start = Counter(), array.array("Q"), Progress(progress), time.time()
    with contextlib.ExitStack() as stack:
        writers = {}
        for split in ("train", "val"):
            file = stack.enter_context(replacing(Path(directory, f"{split}.bin")))
            writers[split] = TokenWriter(file, tokenizer.vocab_size)
        jobs = batches(files, encoding, split_seed, seen, hashes, val)
        for split, tokens in encode_all(jobs, tokenizer, workers):
            writers[split].add(tokens)
            done = seen["bytes", "train"] + seen["bytes", "val"]
            speed = done / max(time.time() - start, 1e-9)
            show(f"packing: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {speed / 1e6:.1f} MB/s, "
                 f"{max(total - done, 0) / speed:.0f} s left")
        if not hashes:
            raise ValueError(f"no text in {shorten(files)}")
        stats = {"notices": notices(seen, hashes, encoding)}
        for split, writer in writers.items():
            stats[split] = writer.finish(seen["documents", split], seen["bytes", split])
    return stats


def batches(files, encoding, seed, seen, hashes, val=()):
    """Yields (split, [(text, begins, ends), ...]): parts of documents, about PIECE characters.

    Counts in `seen` and puts a hash of each document into `hashes`.
    """
    by_document = not val and splits_by_document(files, encoding, seed)
    waiting, sizes = defaultdict(list), Counter()
    for path, document in all_documents([*files, *val], encoding):
        whole, before = hashlib.blake2b(digest_size=8), seen["characters", path]
        sides = ({"val" if path in val else "train": document} if val else
                 split_document(document, by_document, seed))
        for split, pieces in sides.items():
            pieces = itertools.pairwise(itertools.chain(pieces, [None]))
            for n, (piece, following) in enumerate(pieces):
                text = clean(piece)                         # invalid sequences become U+FFFD
                data = text.encode()
                whole.update(data)
                seen["invalid", path] += text.count(UNKNOWN) - piece.count(UNKNOWN)
                seen["characters", path] += len(text)
                seen["bytes", split] += len(data)
                seen["documents", split] += following is None
                waiting[split].append((text, n == 0, following is None))
                sizes[split] += len(text)
                if sizes[split] >= PIECE:
                    yield split, waiting.pop(split)
                    sizes[split] = 0
        if seen["characters", path] == before:
            seen["empty"] += 1
        else:
            hashes.append(int.from_bytes(whole.digest(), "big"))
    yield from waiting.items()


def notices(seen, hashes, encoding) -> list[str]:
    """What to tell of what was seen; ValueError if more than 1 % of a file is invalid."""
    invalid = {key[1]: count for key, count in seen.items() if key[0] == "invalid" and count}
    for path, count in invalid.items():
        if 100 * count > seen["characters", path]:
            raise ValueError(f"{path} is not {encoding or 'UTF-8'}: name its encoding, as in "
                             "--encoding gb18030")
    copies = len(hashes) - len(set(hashes))
    total = sum(invalid.values())
    return [told for count, told in (
        (total, f"{total} invalid sequences became U+FFFD: {shorten([*invalid])}"),
        (seen["empty"], f"{seen['empty']} empty documents left out"),
        (copies, f"{copies} of {len(hashes)} documents are copies of others")) if count]


def encode_all(jobs, tokenizer, workers):
    """Yields (split, tokens) of each job, in order; only so many wait as keep the workers busy."""
    if workers == 1:
        yield from ((split, encode_parts(parts, tokenizer)) for split, parts in jobs)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer,)) as pool:
        pending = deque()
        for split, parts in jobs:
            pending.append((split, pool.submit(encode_parts, parts)))
            if len(pending) > 2 * workers:
                split, future = pending.popleft()
                yield split, future.result()
        yield from ((split, future.result()) for split, future in pending)


worker_tokenizer = None                                     # in a process of the pool


def start_worker(tokenizer):
    """The tokenizer is sent to each process once, not with each job."""
    global worker_tokenizer
    worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the main process


def encode_parts(parts, tokenizer=None) -> np.ndarray:
    """The tokens of parts of documents, each whole document followed by end_id."""
    tokenizer, tokens = tokenizer or worker_tokenizer, []
    for text, begins, ends in parts:
        tokens += tokenizer.encode_part(text, begins, ends) + [tokenizer.end_id] * ends
    return np.array(tokens, dtype=np.uint32)


class TokenWriter:
    """Writes a token file: a header, then tokens as little-endian uint16 or uint32."""

    def __init__(self, file, vocab_size: int):
        self.file, self.vocab_size, self.count, self.crc = file, vocab_size, 0, 0
        self.dtype = "uint16" if vocab_size <= 65536 else "uint32"
        file.write(b" " * HEADER)

    def add(self, tokens: np.ndarray):
        if tokens.max(initial=0) >= self.vocab_size:
            raise ValueError(f"token {tokens.max()} in a vocabulary of {self.vocab_size}")
        data = tokens.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
        self.count, self.crc = self.count + len(tokens), zlib.crc32(data, self.crc)
        self.file.write(data)

    def finish(self, documents: int, size: int) -> dict:
        stats = {"tokens": self.count, "documents": documents, "bytes": size}
        header = {"format": "tokens-1", "dtype": self.dtype, "vocab_size": self.vocab_size,
                  **stats, "crc32": self.crc}
        self.file.seek(0)
        self.file.write(json.dumps(header).ljust(HEADER - 1).encode() + b"\n")
        return stats


def open_tokens(path, vocab_size: int | None = None, headerless=False) -> tuple[np.ndarray, dict]:
    """(tokens as a memory map, header) of a token file, after checking format, size and checksum.

    headerless: nanoGPT's train.bin, uint16 and nothing else. ValueError or OSError: no such file,
    damaged, or of a larger vocabulary than vocab_size.
    """
    path = Path(path)
    size = path.stat().st_size
    header, start = {"format": "headerless", "dtype": "uint16", "tokens": size // 2}, 0
    try:
        if not headerless:
            with open(path, "rb") as file:
                header, start = json.loads(file.read(HEADER)), HEADER
            if header["format"] != "tokens-1" or not {"vocab_size", "crc32"} <= header.keys():
                raise ValueError
        expected = start + {"uint16": 2, "uint32": 4}[header["dtype"]] * header["tokens"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a token file written by this project (nanoGPT's: "
                         "headerless=True)") from None
    if size != expected:
        raise ValueError(f"{path} has {size} bytes instead of {expected}: it is cut off or damaged")
    dtype, crc, highest = np.dtype(header["dtype"]).newbyteorder("<"), 0, -1
    if not header["tokens"]:
        return np.zeros(0, dtype), header
    tokens = np.memmap(path, dtype, "r", offset=start, shape=(header["tokens"],))
    for at in range(0, len(tokens), 4 << 20):
        block = tokens[at:at + (4 << 20)]
        crc, highest = zlib.crc32(block, crc), max(highest, int(block.max()))
    if crc != header.get("crc32", crc):
        raise ValueError(f"{path} is damaged: its checksum does not match")
    needed = header.setdefault("vocab_size", highest + 1)
    if vocab_size is not None and needed > vocab_size:
        raise ValueError(f"{path} was made with a vocabulary of {needed}, not {vocab_size}: pack "
                         "the text again with this tokenizer")
    return tokens, header


# ---- command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """`python tokenizer.py`."""
    parser = Parser(description="Packs text into token files, train.bin and val.bin.")
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA", help="text, JSON, parquet; folders and patterns of them")
    add("--out", required=True, metavar="DIR", help="folder for the result")
    add("--tokenizer", metavar="NAME_OR_PATH", help="bytes, gpt2, a file or a folder; without it a "
        "new one is trained on the text")
    add("--vocab", type=int, metavar="N", help="size of the new vocabulary (4096)")
    add("--encoding", metavar="NAME", help="of text without a byte order mark (utf-8)")
    add("--workers", type=number(int, low=1), metavar="N", help="processes (as many as pay)")
    add("--seed", type=int, default=0, metavar="N", help="of what is held out (0)")
    args = parser.parse_args(argv)
    if args.tokenizer and args.vocab:
        parser.error("--vocab is for a new vocabulary: leave it or --tokenizer out")
    try:
        files, notices = find_files(args.data, args.encoding)
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer)
        else:
            texts = sample(files, args.encoding, args.seed)
            tokenizer = train_bpe(texts, (args.vocab or 4096) - 1, notices=notices, progress=True)
        stats = pack(files, tokenizer, args.out, args.seed, args.encoding, args.workers, True)
        tokenizer.save(args.out)
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: nothing was written\n")
    for notice in [*notices, *stats.pop("notices")]:
        print(notice)
    for split, s in stats.items():
        print(f"{split}: {s['documents']} documents, {s['bytes']:,} bytes, {s['tokens']:,} tokens")


if __name__ == "__main__":
    main()
