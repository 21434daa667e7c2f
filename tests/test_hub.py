"""Weights by name, from a hub of this machine: a server that answers as the real one does."""
import importlib.util
import json
import re
import shutil
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import ROOT, assert_one_line_error, run

import hub
from checkpoints import MODELS, model_parts

needs_hub = pytest.mark.skipif(not importlib.util.find_spec("huggingface_hub"),
                               reason="needs huggingface_hub")
SHA = "0123456789abcdef0123456789abcdef01234567"


class Answers(BaseHTTPRequestHandler):
    """One request to the hub; what it serves is in the server: name -> {file: bytes}."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def reply(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": SHA,
                            **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        asked = re.match(r"(/api/models)?/(\w[\w.-]*/[\w.-]+)(?:/resolve/\w+/(.*)|/.*)?$", path)
        files = self.server.models.get(asked[2]) if asked else None
        token = self.headers.get("Authorization")
        if token and token != "Bearer good":
            return self.reply(401, b"{}", X_Error_Message="Invalid credentials in Authorization header")
        if files is None:
            return self.reply(401 if token is None else 404, b"{}", X_Error_Code="RepoNotFound")
        if asked[1]:
            listed = [{"type": "file", "path": file, "rfilename": file, "size": len(content),
                       "oid": sha256(content).hexdigest()[:40]} for file, content in files.items()]
            answer = listed if "/tree/" in path else {
                "id": asked[2], "modelId": asked[2], "sha": SHA, "siblings": listed}
            return self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")
        if asked[2] in self.server.gated and not token:
            return self.reply(401, b"{}", X_Error_Code="GatedRepo")
        if asked[2] in self.server.refused:
            return self.reply(403, b"{}", X_Error_Code="GatedRepo")
        content, start = files[asked[3]], 0
        if self.command == "GET":
            self.server.got.append(asked[3])
            if begin := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start = int(begin[1])
        self.reply(206 if start else 200, content[start:], ETag=f'"{sha256(content).hexdigest()}"',
                   Accept_Ranges="bytes", **(
                       {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
                       if start else {}))

    do_HEAD = do_GET


def read_folder(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def served(golden):
    """A running hub that has a GPT-2 with much beside it, several RWKVs, a gated Llama."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        gpt = read_folder(golden / "gpt2")
        server.models = {"some/gpt2": {
            **{file: content for file, content in gpt.items() if "expected" not in file and file != "about.json"},
            "pytorch_model.bin": b"twice", "tf_model.h5": b"thrice", "onnx/model.onnx": b"x",
            "original/consolidated.00.pth": b"again", "README.md": b"text"}}
        server.gated, server.refused, server.got = set(), set(), []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(served, tmp_path):
    """Runs a command with this hub; words alone are given to hub.locate."""
    locate = """import sys, hub
try:
    print(*map(hub.locate, sys.argv[1:]))
except (OSError, ValueError) as error:
    sys.exit(print(error, file=sys.stderr) or 2)"""

    def ask(*words, **environment):
        command = words if words[0].endswith(".py") else ("-c", locate, *words)
        return run(*command, **{
            "HF_ENDPOINT": f"http://127.0.0.1:{served.server_port}", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "", "NO_PROXY": "*",
            "HF_HUB_DISABLE_XET": "1", **environment})
    return ask


@needs_hub
def test_a_name_downloads_only_what_loading_reads_and_once(ask, served, golden):
    process = ask("chat.py", "some/gpt2", "--tokenizer", "bytes", "--prompt", "a", "--chat", "none",
                  "--max-new-tokens", "2")
    assert process.returncode in (0, 2), process.stderr
    assert "download   some/gpt2: 0.00 GB in 1 file, to " in process.stderr, process.stderr
    assert sorted(served.got) == ["config.json", "model.safetensors"]
    again = ask("some/gpt2")
    assert again.returncode == 0 and "download" not in again.stderr, again.stderr
    assert sorted(served.got) == ["config.json", "model.safetensors"]
    import gpt
    names = gpt.GPT.from_pretrained(again.stdout.strip()).state_dict()
    assert all(torch.equal(tensor, names[name]) for name, tensor in
               gpt.GPT.from_pretrained(golden / "gpt2").state_dict().items())


@needs_hub
def test_without_a_network_what_was_downloaded_is_used(ask, served):
    first = ask("some/gpt2")
    assert first.returncode == 0, first.stderr
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for environment, words in ((nobody, "does not answer"),
                               ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        again = ask("some/gpt2", **environment)
        assert again.stdout == first.stdout and words in again.stderr, again.stderr
        assert_one_line_error(ask("some/other", **environment), "some/other", words)


@needs_hub
def test_after_an_interruption_only_missing_files_are_fetched(ask, served, tmp_path):
    weights = served.models["some/gpt2"].pop("model.safetensors")
    half = {f"model-0000{n}-of-00002.safetensors": weights[:n * 1000] for n in (1, 2)}
    served.models["some/gpt2"] |= half
    assert ask("some/gpt2").returncode == 0
    [link] = (tmp_path / "cache" / "hub").rglob("snapshots/*/model-00002-of-00002.safetensors")
    link.resolve().rename(f"{link.resolve()}.incomplete")               # as Ctrl-C leaves it
    link.unlink(missing_ok=True)
    served.got.clear()
    again = ask("some/gpt2")
    assert served.got == ["model-00002-of-00002.safetensors"], again.stderr
    assert link.read_bytes() == half[link.name]


@needs_hub
def test_each_refusal_of_a_hub_is_one_line_that_says_what_to_do(ask, served):
    served.gated.add("some/gpt2")
    assert_one_line_error(ask("some/gpt2"), "licence", "/some/gpt2", "hf auth login", "HF_TOKEN")
    served.refused.add("some/gpt2")
    assert_one_line_error(ask("some/gpt2", HF_TOKEN="good"), "not open to the account", "licence")
    assert_one_line_error(ask("some/gpt2", HF_TOKEN="bad"), "token is not valid", "hf auth login")
    assert_one_line_error(ask("no/body"), "no/body", "no such file or folder", "private")
    assert_one_line_error(ask("no/body", HF_TOKEN="good"), "no/body", "may see")


@needs_hub
def test_a_model_that_is_not_read_here_is_refused_before_its_weights_come(ask, served):
    served.models["some/bert"] = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"}
    assert_one_line_error(ask("some/bert"), "bert", "none of gpt2")
    served.models["some/gguf"] = {"model.gguf": b"GGUF"}
    assert_one_line_error(ask("some/gguf"), "no weights that are read here", "model.gguf")
    assert served.got == ["config.json"]


@needs_hub
def test_of_several_models_in_one_repository_each_has_a_name(ask, served):
    served.models["some/rwkv"] = {"a.pth": b"1", "b.pth": b"2", "README.md": b""}
    assert_one_line_error(ask("some/rwkv"), "several models", "some/rwkv/a.pth, some/rwkv/b.pth")
    process = ask("some/rwkv/b.pth")
    assert process.stdout.strip().endswith("b.pth") and served.got == ["b.pth"], process.stderr


def test_of_several_formats_one_is_taken_and_no_other_folder():
    llama = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "model.safetensors.index.json", "model-00001-of-00002.safetensors",
             "model-00002-of-00002.safetensors", "original/consolidated.00.pth",
             "original/params.json", "original/tokenizer.model", "LICENSE.txt", "README.md"]
    assert hub.wanted(llama, "a/b", "") == (llama[:5], llama[5:7])
    assert hub.wanted(llama, "a/b", "original") == (llama[8:10], llama[7:8])
    assert hub.wanted(["pytorch_model.bin", "vocab.json"], "a/b", "")[1] == ["pytorch_model.bin"]
    classifier = ["config.json", "head.safetensors", "model.safetensors"]
    assert hub.wanted(classifier, "a/b", "")[1] == classifier[1:]
    adapter = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert hub.wanted(adapter, "a/b", "")[1] == adapter[1:2]


def test_what_is_here_is_no_name_and_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda *place: pytest.fail(f"asked for {place}"))
    (tmp_path / "out" / "gpt").mkdir(parents=True)
    for path in ("out/gpt", "out/gptt", "gpt", "./a/b", "../a/b", "/a/b", "~/a", "a/b c", "a//", r".\a\b"):
        assert str(hub.locate(path)) == str(hub.Path(path))


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="python -m pip install huggingface_hub"):
        hub.locate("some/model")
    assert hub.locate("some/model", download=False) == hub.Path("some/model")


@needs_hub
def test_a_disk_without_room_is_said_before_the_download(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 10**9))
    with pytest.raises(ValueError, match=r"needs 2.50 GB, and 1.00 GB are free in .*HF_HOME"):
        hub.check_space(2_500_000_000, 1, "a/b")


def gigabytes(model, size):
    """(stored, in bf16, in int8, in int4) of a published size: what practice/fast.py makes of it."""
    model_class, _, sizes = model_parts(model)
    with torch.device("meta"):
        built = model_class(sizes[size])
    stored = sum(p.numel() for p in built.parameters()) * (4 if model == "gpt" else 2)
    if model == "gpt":                       # its files hold the masks too
        stored += 4 * sizes[size].n_layer * sizes[size].n_positions ** 2
    linears = [module for module in built.modules() if type(module) is torch.nn.Linear]
    inside = {id(module.weight) for module in linears if module.weight is not table(built)}
    rest = sum(2 * p.numel() for p in built.parameters() if id(p) not in inside)
    int8 = sum(m.out_features * (m.in_features + 2) for m in linears)
    int4 = sum(m.out_features * m.in_features * (1 / 2 + 4 / 32) for m in linears)
    return stored, sum(2 * p.numel() for p in built.parameters()), rest + int8, rest + int4


def table(model):
    """The embedding's weight, which stays as it is where a tied head is quantised."""
    return next(m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))


def written(size):
    return f"{size / 1e9:.1f}" if size >= 1e9 else f"{size / 1e9:.2f}"


def test_readme_states_the_sizes_of_published_weights():
    rows = re.findall(r"^\| `(\w+)` ([\w.-]+) \| (.*?) \| ([\d. |]+) \|$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(rows) > 30
    for model, size, _, numbers in rows:
        assert numbers.split(" | ") == [*map(written, gigabytes(model, size))], (model, size)
    named = {(model, size) for model, size, *_ in rows}
    assert named == {(model, size) for model in MODELS for size in model_parts(model)[2]
                     if size != "enwik8"}    # not on the hub
