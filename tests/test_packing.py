"""data.py: what is held out, token files: nothing lost, nothing reordered, damage noticed."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

import data
from data import TextFile, held_out, open_tokens, pack, read_documents, split_document
from helpers import run, run_here
from tokenizer import Bytes, clean, load_tokenizer, train_bpe


def find_files(paths):
    files, notices = data.find_files(paths)
    assert not notices
    return files


def corpus(folder, count=60, seed=0):
    """Files of Python-like text, some in sub-folders; returns {name: text}."""
    rng, texts = random.Random(seed), {}
    for n in range(count):
        name = f"{'sub/' * (n % 3)}{n:03}.txt"
        lines = [
            rng.choice(["", "", "    "])
            + " ".join(rng.choices(["def", "x", "=", "é", "1234", "你好"], k=6))
            + rng.choice(["\n", "\n\n", ";\n \n"])
            for _ in range(rng.randrange(1, 80))
        ]
        texts[name] = "".join(lines)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(texts[name], encoding="utf-8", newline="")
    return texts


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(["def x = é 1234 你好\n    def x = é\n\n" * 3], 300)


def read_tokens(folder):
    return {split: open_tokens(folder / f"{split}.bin")[0].tolist() for split in ("train", "val")}


def test_packed_ids_are_the_documents_in_order_each_with_its_end(tmp_path, bpe):
    texts = corpus(tmp_path / "data")
    stats = pack(find_files([str(tmp_path / "data")]), bpe, tmp_path / "out", split_seed=3)
    packed = read_tokens(tmp_path / "out")
    for split in ("train", "val"):
        names = [n for n in sorted(texts) if held_out([texts[n]], 3) == (split == "val")]
        assert names and packed[split] == [
            id for n in names for id in [*bpe.encode(texts[n]), bpe.end_id]
        ]
        assert stats[split] == {
            "documents": len(names),
            "tokens": len(packed[split]),
            "bytes": sum(len(texts[n].encode()) for n in names),
        }
    assert stats["notices"] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]


def test_any_number_of_workers_writes_the_same_bytes(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 3000)
    corpus(tmp_path / "data")
    files = find_files([str(tmp_path / "data")])
    results = [pack(files, bpe, tmp_path / str(n), workers=n) for n in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    for split in ("train.bin", "val.bin"):
        assert len({(tmp_path / str(n) / split).read_bytes() for n in (1, 2, 3)}) == 1


def test_packing_works_with_spawned_processes(tmp_path, bpe, root):
    corpus(tmp_path / "data")
    bpe.save(tmp_path / "bpe")
    (tmp_path / "script.py").write_text(
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(root)!r})\n"
        "import data, tokenizer\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    bpe = tokenizer.load_tokenizer('bpe')\n"
        "    data.PIECE = 5000\n"
        "    data.pack(data.find_files(['data'])[0], bpe, 'out', workers=2)\n"
    )
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=120)
    pack(find_files([str(tmp_path / "data")]), bpe, tmp_path / "one", workers=1)
    assert read_tokens(tmp_path / "out") == read_tokens(tmp_path / "one")


def test_few_documents_hold_out_the_last_tenth_of_each(tmp_path):
    texts = {"a.txt": "0123456789" * 10, "b.txt": "é" * 50, "c.txt": "tiny"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    stats = pack(find_files([str(tmp_path)]), Bytes(), tmp_path / "out")
    packed = read_tokens(tmp_path / "out")
    assert packed["train"] == [
        *texts["a.txt"][:90].encode(),
        256,
        *("é" * 45).encode(),
        256,
        *b"tiny",
        256,
    ]
    assert packed["val"] == [*b"0123456789", 256, *("é" * 5).encode(), 256]
    assert (stats["train"]["documents"], stats["val"]["documents"]) == (3, 2)


def test_five_percent_are_held_out_by_content_and_seed():
    texts = [f"text {n}" for n in range(20000)]
    chosen = [{text for text in texts if held_out([text], seed)} for seed in (0, 1)]
    assert all(900 < len(c) < 1100 for c in chosen) and len(chosen[0] & chosen[1]) < 100
    assert held_out(texts[:1], 0) == held_out(texts[:1], 0)


def test_both_splits_get_something_even_if_the_draw_gives_nothing(tmp_path):
    """20 documents of which the draw holds out none: the last tenth of each instead."""
    texts = [f"{n:030}" for n in range(20)]
    seed = next(s for s in range(100) if not any(held_out([text], s) for text in texts))
    for n, text in enumerate(texts):
        (tmp_path / f"{n}.txt").write_text(text)
    files = find_files([str(tmp_path)])
    assert pack(files, Bytes(), tmp_path / "out", split_seed=seed)["val"]["documents"] == 20


def test_equal_documents_stand_on_one_side_and_moved_files_keep_theirs(tmp_path):
    texts = corpus(tmp_path / "a", 40, seed=1)
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    rows = [{"text": text} for text in texts.values()]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seed = next(s for s in range(100) if any(held_out([text], s) for text in texts.values()))
    packed = {}
    for name, paths in {"one": ["a"], "moved": ["elsewhere/b"], "rows": ["c.jsonl"],
                        "all": ["a", "elsewhere/b", "c.jsonl"]}.items():
        files = find_files([tmp_path / path for path in paths])
        stats = pack(files, Bytes(), tmp_path / name, split_seed=seed)
        packed[name] = read_tokens(tmp_path / name)
    assert packed["one"] == packed["moved"]
    assert stats["notices"] == ["80 of 120 documents are copies of others"]
    for split in ("train", "val"):
        documents = {name: Bytes().decode(packed[name][split]).split("<|endoftext|>")[:-1] for name in packed}
        assert documents["one"] and set(documents["one"]) == set(documents["rows"])
        assert sorted(documents["one"] * 3) == sorted(documents["all"])


def test_a_large_document_stands_where_its_copy_does(tmp_path, monkeypatch):
    """A text file in pieces and the same text as one row."""
    monkeypatch.setattr(data, "PIECE", 100_000)
    for n in range(40):
        text = f"{n} " + "word\n" * 40_000
        (tmp_path / "x.txt").write_text(text)
        assert len(list(TextFile(tmp_path / "x.txt"))) > 1
        assert held_out(TextFile(tmp_path / "x.txt"), 1) == held_out([text], 1)


def test_documents_larger_than_a_piece_have_the_ids_of_the_whole(tmp_path, bpe, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 1000)
    text = "".join(corpus(tmp_path / "data", 40, seed=4).values()) + "x\r\n\r\ny  \n  z"
    (tmp_path / "big.txt").write_bytes(text.encode())
    pieces = list(TextFile(tmp_path / "big.txt"))
    assert len(pieces) > 10 and "".join(pieces) == text
    pack([tmp_path / "big.txt"], bpe, tmp_path / "out", workers=2)
    cut = len(text) - len(text) // 10
    assert read_tokens(tmp_path / "out") == {
        "train": [*bpe.encode(text[:cut]), bpe.end_id],
        "val": [*bpe.encode(text[cut:]), bpe.end_id],
    }


def test_cuts_are_only_after_a_newline_before_a_non_space():
    texts = {"a\nb\nc d": 4, "a\n\nb": 3, "a\nb\n": 2, "a\nb\n  c": 2, "a\n b\n": 0, "": 0, "\n": 0}
    assert {text: data.find_cut(text) for text in texts} == texts


def test_text_without_a_place_to_cut_is_still_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 100)
    monkeypatch.setattr(data, "HOLD", 1000)
    (tmp_path / "line.txt").write_text("é" * 20000, encoding="utf-8")
    pieces = list(TextFile(tmp_path / "line.txt"))
    assert "".join(pieces) == "é" * 20000 and max(map(len, pieces)) <= 1100


def test_invalid_utf8_is_replaced_and_counted_wherever_it_stands(tmp_path, monkeypatch):
    rng = random.Random(0)
    for piece in (3, 7, 1 << 20):
        monkeypatch.setattr(data, "PIECE", piece)
        for _ in range(30):
            good = ["a", "\n", "é", "你", "\ufffd", "\U0001f600"]
            parts = rng.choices(
                [*(g.encode() for g in good), b"\xff", b"\xc3(", b"\xe4\xbd("], k=40
            )
            (tmp_path / "x.txt").write_bytes(b"".join(parts))
            found = "".join(TextFile(tmp_path / "x.txt"))
            assert clean(found) == b"".join(parts).decode("utf-8", "replace")
            assert found.count(data.INVALID) == sum(b"\xff" in p or b"(" in p for p in parts)


def test_jsonl_has_a_document_a_line(tmp_path):
    lines = [{"text": f"document {n} é"} for n in range(30)] + [
        {"text": "a\ud800"},
        {"text": "", "id": 1},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    documents = ["".join(document) for document in read_documents(tmp_path / "x.jsonl")]
    assert documents == [line["text"] for line in lines]
    seed = next(s for s in range(100) if any(held_out([text], s) for text in documents[1:20]))
    stats = pack(
        find_files([str(tmp_path / "x.jsonl")]), Bytes(), tmp_path / "out", split_seed=seed
    )
    assert stats["train"]["documents"] + stats["val"]["documents"] == 31
    assert stats["notices"] == [
        f"1 invalid sequences became U+FFFD: {tmp_path / 'x.jsonl'}",
        "1 empty documents left out",
    ]
    assert "a\ufffd" in Bytes().decode(sum(read_tokens(tmp_path / "out").values(), []))


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"txt": "a"}', '{"text": 1}', '"text"', "1", '{"text": null}']
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"x.jsonl, line 2: "):
        pack(find_files([str(tmp_path / "x.jsonl")]), Bytes(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_files_are_found_in_folders_globs_and_by_name(tmp_path, monkeypatch):
    for name in (
        "b.py",
        "a/c.txt",
        "a/deep/d.md",
        ".hidden",
        ".git/x.txt",
        "a/.secret/y.txt",
        "noext",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "odd [1].txt").write_text("text")
    names = ["a/c.txt", "a/deep/d.md", "b.py", "noext", "odd [1].txt"]
    files, notices = data.find_files([tmp_path])
    assert files == [tmp_path / name for name in names]
    assert notices == ["1 of 6 files left out: binary: picture.png"]
    monkeypatch.chdir(tmp_path)
    assert list(map(str, find_files(["**/*.txt"]))) == ["a/c.txt", "odd [1].txt"]
    assert list(map(str, find_files(["odd [1].txt", ".hidden"]))) == [".hidden", "odd [1].txt"]
    assert list(map(str, find_files(["a", "a/c.txt", "a/*"]))) == ["a/c.txt", "a/deep/d.md"]
    assert len({path.resolve() for path in data.find_files(["a", "."])[0]}) == 5


def test_files_of_the_same_name_are_both_kept(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    found = find_files([str(tmp_path / "one"), str(tmp_path / "two")])
    assert [path.read_text() for path in found] == ["one", "two"]


@pytest.mark.parametrize("missing", ["nothing-here", "*.nothing", "empty-folder"])
def test_an_input_that_gives_nothing_is_named(tmp_path, monkeypatch, missing):
    (tmp_path / "empty-folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        data.find_files([missing])
    assert missing in str(caught.value) and "\n" not in str(caught.value)


def test_empty_files_are_skipped_and_counted_and_no_text_at_all_is_an_error(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="no text in .*empty.txt"):
        pack(find_files([str(tmp_path)]), Bytes(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "full.txt").write_text("hello world")
    stats = pack(find_files([str(tmp_path / "*.txt")]), Bytes(), tmp_path / "out")
    assert stats["train"]["documents"] == 1
    assert stats["notices"] == ["1 empty documents left out"]
    assert read_tokens(tmp_path / "out")["train"] == [*b"hello worl", 256]


def test_a_failure_leaves_the_old_files_as_they_were(tmp_path, bpe, monkeypatch):
    corpus(tmp_path / "data")
    files = find_files([str(tmp_path / "data")])
    pack(files, bpe, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(type(bpe), "encode_part", lambda *_: [999999])
    with pytest.raises(ValueError, match="999999"):
        pack(files, bpe, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path, vocab_size, dtype):
    tokenizer = Bytes()
    tokenizer.vocab_size, tokenizer.end_id = vocab_size, vocab_size - 1
    (tmp_path / "x.txt").write_text("hello")
    pack(find_files([str(tmp_path / "x.txt")]), tokenizer, tmp_path)
    ids, header = open_tokens(tmp_path / "train.bin", vocab_size)
    assert ids.dtype == dtype and header["dtype"] == dtype and ids[-1] == vocab_size - 1
    first = (tmp_path / "train.bin").read_bytes()[:512]
    assert first.endswith(b" \n") and json.loads(first) == header
    assert list(header) == [
        "format",
        "dtype",
        "vocab_size",
        "tokens",
        "documents",
        "bytes",
        "crc32",
    ]


@pytest.fixture
def packed(tmp_path):
    (tmp_path / "x.txt").write_text("hello world, hello tokens\n" * 20)
    pack(find_files([str(tmp_path / "x.txt")]), Bytes(), tmp_path)
    return tmp_path / "train.bin"


@pytest.mark.parametrize(
    "damage, complaint",
    [
        (lambda data: data[:-1], "bytes instead of"),
        (lambda data: data + b"\0\0", "bytes instead of"),
        (lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:], "checksum"),
        (lambda data: data[512:], "not a token file"),
        (lambda data: b"", "not a token file"),
        (lambda data: b"[]" + data[2:], "not a token file"),
        (lambda data: data.replace(b"tokens-1", b"tokens-9"), "not a token file"),
        (lambda data: data.replace(b'"uint16"', b'"object"'), "not a token file"),
    ],
)
def test_damaged_token_files_are_noticed(packed, damage, complaint):
    packed.write_bytes(damage(packed.read_bytes()))
    with pytest.raises(ValueError, match=complaint) as caught:
        open_tokens(packed)
    assert str(packed) in str(caught.value) and "\n" not in str(caught.value)


def test_token_files_of_a_larger_vocabulary_are_refused(packed):
    assert open_tokens(packed, 257)[1]["tokens"] == open_tokens(packed, 5000)[1]["tokens"]
    with pytest.raises(ValueError, match="257, not 256"):
        open_tokens(packed, 256)
    with pytest.raises(OSError):
        open_tokens(packed.with_name("missing.bin"))


def test_nanogpts_token_files_are_read_when_asked_for(tmp_path):
    np.array([1, 50256, 3], dtype="<u2").tofile(tmp_path / "train.bin")
    ids, header = open_tokens(tmp_path / "train.bin", 50257, headerless=True)
    assert ids.tolist() == [1, 50256, 3] and header["tokens"] == 3 and header["dtype"] == "uint16"
    with pytest.raises(ValueError, match="50257, not 50000"):
        open_tokens(tmp_path / "train.bin", 50000, headerless=True)
    with pytest.raises(ValueError, match="headerless"):
        open_tokens(tmp_path / "train.bin", 50257)


def test_a_token_file_may_hold_nothing(tmp_path):
    (tmp_path / "x.txt").write_text("tiny")
    assert pack(find_files([str(tmp_path / "x.txt")]), Bytes(), tmp_path)["val"]["tokens"] == 0
    assert len(open_tokens(tmp_path / "val.bin")[0]) == 0


def test_splitting_yields_all_text_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 500)
    for name, text in corpus(tmp_path, 5).items():
        for document in (TextFile(tmp_path / name), [text]):
            both = {split: "".join(pieces) for split, pieces in split_document(document, False).items()}
            assert both["train"] + both["val"] == text and len(both["val"]) == len(text) // 10
            [(split, pieces)] = split_document(document, True).items()
            assert "".join(pieces) == text and (split == "val") == held_out(document)


def test_command_line_packs_and_saves_the_tokenizer(tmp_path, root):
    texts = corpus(tmp_path / "data")
    done = run(
        root / "tokenizer.py", "data", "--out", "out", "--vocab", "270", "--workers", "2", "--seed", "3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 270 and "train: " in done.stdout
    text = "".join(tokenizer.decode(ids) for ids in read_tokens(tmp_path / "out").values())
    assert len(text) == sum(map(len, texts.values())) + len(texts) * len("<|endoftext|>")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["missing", "--out", "out"], "missing"),
        (["x.txt"], "--out"),
        ([], "DATA"),
        (["x.txt", "--out", "out", "--vocab", "9"], "256"),
        (["x.txt", "--out", "out", "--workers", "0"], "workers"),
        (["x.txt", "--out", "out", "--vocab", "many"], "many"),
        (["x.txt", "--out", "out", "--vocab", "300", "--tokenizer", "bytes"], "--vocab"),
        (["x.txt", "--out", "out", "--tokenizer", "nothing"], "nothing"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, arguments, complaint):
    (tmp_path / "x.txt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    done = run_here(data.main, *arguments)
    assert done.returncode == 2 and complaint in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_help_names_every_flag():
    done = run_here(data.main, "--help")
    assert done.returncode == 0 and all(
        f in done.stdout for f in ("--out", "--tokenizer", "--vocab", "--workers")
    )
