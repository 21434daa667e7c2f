"""Published vocabularies by stand-ins of 256 bytes and a few tokens: what needs no real files."""
import base64
import json

import pytest
import regex

import tokenizer as tk
from tokenizer import AddedTokens, World, load_tokenizer, train_bpe

LINE = "I'm we'LL 12345 x2 don't!!\n\n  \t(y)  \r\n\r\n_é 'S…  "
GPT2 = ["I", "'m", " we", "'", "LL", " 12345", " x", "2", " don", "'t", "!!", "\n\n  ", "\t", "(", "y", ")",
        "  \r\n\r", "\n", "_", "é", " '", "S", "…", "  "]
LATER = ["I", "'m", " we", "'LL", " ", "123", "45", " x", "2", " don", "'t", "!!\n\n", "  ", "\t", "(y", ")",
         "  \r\n\r\n", "_é", " '", "S", "…", "  "]
PUBLISHED = {
    "GPT2_PATTERN": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT4_PATTERN": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "LLAMA3_PATTERN": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                      r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
TEXTS = ("'s't're've'm'll'd 'S 'T 'RE", " 1 12 1234567 x1 ½²", "a  b\n\n c \n\td\r\ne   ", "  \n \n x\n\n\n",
         "你好,世界! ñandú ʼn", "_a-b.c!!\n\n??\r\n (x)", "\u00a0x\u3000y", "")


@pytest.mark.parametrize("name, pieces", [("GPT2_PATTERN", GPT2), ("GPT4_PATTERN", LATER), ("LLAMA3_PATTERN", LATER)])
def test_patterns_cut_as_the_published_ones(name, pieces):
    assert regex.findall(getattr(tk, name), LINE) == pieces
    for text in (LINE, *TEXTS):
        assert regex.findall(getattr(tk, name), text) == regex.findall(PUBLISHED[name], text), text


def tiktoken_file(folder, more=(b"ab", b"abc", b"\n\n"), name="tokenizer.model"):
    tokens = [*(bytes([n]) for n in range(256)), *more]
    (folder / name).write_text("".join(f"{base64.b64encode(t).decode()} {n}\n" for n, t in enumerate(tokens)))
    return len(tokens)


LLAMA3 = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|reserved_special_token_0|>": 2,
          "<|reserved_special_token_3|>": 5, "<|start_header_id|>": 6, "<|end_header_id|>": 7,
          "<|reserved_special_token_4|>": 8, "<|eot_id|>": 9, "<|reserved_special_token_5|>": 10,
          "<|reserved_special_token_250|>": 255}
LLAMA31 = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|reserved_special_token_0|>": 2,
           "<|reserved_special_token_1|>": 3, "<|finetune_right_pad_id|>": 4, "<|step_id|>": 5,
           "<|start_header_id|>": 6, "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
           "<|image|>": 11, "<|reserved_special_token_2|>": 12, "<|reserved_special_token_245|>": 255}
GLM4 = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
        "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]


@pytest.mark.parametrize("kind, named, count, bos, prefix, stops", [
    ("llama3", LLAMA3, 256, 0, (0,), (1, 9)), ("llama3.1", LLAMA31, 256, 0, (0,), (1, 8, 9)),
    ("glm4", dict(zip(GLM4, range(14))), 14, None, (2, 4), (0, 7, 9)),
    ("glm4-0414", dict(zip(GLM4, range(14))), 14, None, (2, 4), (0, 7, 9))])
def test_control_tokens_follow_the_vocabulary_with_their_published_numbers(kind, named, count, bos, prefix, stops, tmp_path):
    first = tiktoken_file(tmp_path)
    tokenizer = load_tokenizer(tmp_path, kind)
    assert len(tokenizer.special_ids) == count and tokenizer.vocab_size == first + count
    assert {name: tokenizer.special_ids[name] - first for name in named} == named
    assert sorted(tokenizer.special_ids.values()) == [*range(first, first + count)]
    assert tokenizer.bos_id == (None if bos is None else first + bos)
    assert tokenizer.prefix_ids == tuple(first + n for n in prefix)
    assert tokenizer.stop_ids == tuple(first + n for n in stops)
    assert tokenizer.end_id == first + (0 if kind.startswith("glm") else 1)
    assert tokenizer.chat_format == kind and tokenizer.text_size == first
    assert tokenizer.encode("abcab\n\n") == [257, 256, 258]
    assert tokenizer.decode([257, first]) == "abc" + next(iter(named))


def test_llama3_strips_what_is_said_and_llama31_does_not(tmp_path):
    first = tiktoken_file(tmp_path)
    talk = [{"role": "user", "content": " ab \n"}, {"role": "assistant", "content": "ab "}]
    for kind, said, reply in (("llama3", "ab", "ab"), ("llama3.1", " ab \n", "ab ")):
        tokenizer = load_tokenizer(tmp_path, kind)

        def turn(role, words, tokenizer=tokenizer):
            return [first + 6, *map(ord, role), first + 7, 258, *tokenizer.encode(words), first + 9]
        assert tokenizer.encode_chat(talk) == [first, *turn("user", said), *turn("assistant", reply)]
        parts = tokenizer.chat_parts(talk)
        assert [ids for ids, is_reply in parts if is_reply] == [[*tokenizer.encode(reply), first + 9]]
        asks = tokenizer.encode_chat(talk[:1])
        assert asks == [first, *turn("user", said), first + 6, *map(ord, "assistant"), first + 7, 258]


def world(tokens, number=1):
    lines = [f"{n} {token!r} {len(token if isinstance(token, bytes) else token.encode())}"
             for n, token in enumerate(tokens, number)]
    return ("\n".join(lines) + "\n").encode()


def test_world_takes_the_longest_token_that_fits_from_the_left():
    more = ["ab", "abc", "abcd", "abcdefg", "cdefgh", "é", "\n\n", "a\n\nb", "abcdx"]
    tokenizer = World(world([bytes([n]) for n in range(256)] + more), "vocab")
    id = {token: 257 + n for n, token in enumerate(more)}
    for text, want in (("abcdefgh", ["abcdefg", "h"]), ("abcdef", ["abcd", "e", "f"]), ("abce", ["abc", "e"]),
                       ("abx", ["ab", "x"]), ("ax", ["a", "x"]), ("xcdefgh", ["x", "cdefgh"]), ("abcdxabcd", ["abcdx", "abcd"]),
                       ("é", ["é"]), ("a\n\nb\n\n", ["a\n\nb", "\n\n"]), ("", []), ("zabc", ["z", "abc"])):
        assert tokenizer.encode(text) == [id.get(token) or ord(token) + 1 for token in want], text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_id == 0 and tokenizer.bos_id is None and tokenizer.vocab_size == 257 + len(more)
    assert tokenizer.decode([0]) == "\ufffd" and tokenizer.special_ids == {"<|endoftext|>": 0}
    assert tokenizer.chat_format == "world" and tokenizer.stop_ids == (0, id["\n\n"], id["a\n\nb"])
    tokenizer.chat_format = None
    assert tokenizer.stop_ids == (0,)


@pytest.mark.parametrize("line, words", [
    ("300 'ab' 3", "line 257.*id literal length"), ("x 'ab' 2", "line 257"), ("300 ab 2", "line 257"),
    ("300 5 1", "line 257"), ("300 'ab'", "line 257"), ("300 open('x') 2", "line 257")])
def test_a_broken_line_of_world_is_named_by_its_number(line, words):
    with pytest.raises(ValueError, match=words):
        World(world([bytes([n]) for n in range(256)]) + line.encode(), "vocab")
    with pytest.raises(ValueError, match="single bytes are missing"):
        World(world([bytes([n]) for n in range(255)]), "vocab")


def test_of_added_tokens_that_begin_together_the_longest_counts():
    added = [{"content": text, "id": id} for text, id in (("<a>", 5), ("<a><b>", 6), ("<b>", 7), ("  ", 8))]
    tokens = AddedTokens({"<end>": 9}, added, False)
    assert [*tokens.split("x<a><b><a>  y<end>")] == ["x", 6, 5, 8, "y<end>"]
    assert [*tokens.split("x<a><b><end>", special=True)] == ["x", 6, 9]
    assert [*tokens.split("")] == [] and [*tokens.split("plain")] == ["plain"]


def test_white_space_words_and_normal_forms_of_added_tokens():
    flags = {"content": "<m>", "id": 5}
    for more, text, want in (
            ({}, "a <m> b", ["a ", 5, " b"]), ({"lstrip": True}, "a  <m> b", ["a", 5, " b"]),
            ({"rstrip": True}, "a <m>  b", ["a ", 5, "b"]), ({"single_word": True}, "a<m> <m>b <m> .", ["a<m> <m>b ", 5, " ."]),
            ({"lstrip": True, "rstrip": True}, " <m> ", [5])):
        assert [*AddedTokens({}, [{**flags, **more}], False).split(text)] == want, more
    composed = {"content": "\u00e9", "id": 5, "normalized": True}
    assert [*AddedTokens({}, [composed], True).split("xe\u0301y")] == ["x", 5, "y"]
    assert [*AddedTokens({}, [composed], False).split("xe\u0301y")] == ["xe\u0301y"]
    assert [*AddedTokens({}, [{**composed, "normalized": False}], True).split("xe\u0301y")] == ["x\u00e9y"]


@pytest.mark.parametrize("stated", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_an_end_that_only_tokenizer_config_names_ends_a_turn(stated, tmp_path):
    train_bpe(["some text " * 5], 260).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    [end] = data["added_tokens"]
    data["added_tokens"].append({**end, "id": end["id"] + 1, "content": "<|im_end|>"})
    file.write_text(json.dumps(data))
    assert load_tokenizer(tmp_path).stop_ids == (end["id"],)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": stated}))
    assert end["id"] + 1 in load_tokenizer(tmp_path).stop_ids


def test_nfc_where_tokenizer_json_asks_for_it(tmp_path):
    train_bpe(["some text " * 5], 260).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    plain = load_tokenizer(tmp_path)
    assert plain.encode("e\u0301") != plain.encode("\u00e9")
    file.write_text(json.dumps({**data, "normalizer": {"type": "NFC"}}))
    composed = load_tokenizer(tmp_path)
    assert composed.encode("e\u0301") == composed.encode("\u00e9") == plain.encode("\u00e9")
