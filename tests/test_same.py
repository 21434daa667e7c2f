"""Duplication between model files is deliberate, marked, and here held equal."""
import ast
import re
import sys

import pytest

CLASSES = {"gpt.py": "GPT", "llama3.py": "Llama3", "glm4.py": "GLM4", "rwkv6.py": "RWKV6",
           **{f"lineage/rwkv{n}.py": f"RWKV{n}" for n in (2, 3, 4, 5)}}
ATTENTION = ("gpt.py", "llama3.py", "glm4.py")
BLOCKS = {"generate": tuple(CLASSES), "sample": tuple(CLASSES), "cache": ATTENTION,
          "read_tensors": ATTENTION, "attend": ("llama3.py", "glm4.py")}


def block(root, file, name):
    """The text between the marks, with the class called MODEL."""
    text = (root / file).read_text(encoding="utf-8")
    found = re.findall(rf"# --- {name}: the same .*?\n(.*?)# --- end of {name} ---\n", text, re.S)
    assert len(found) == 1, f"{file} has {len(found)} blocks marked {name}"
    return re.sub(rf"\b{CLASSES[file]}\b", "MODEL", found[0])


@pytest.mark.parametrize("name", BLOCKS)
def test_marked_blocks_are_the_same_text_in_every_file_that_has_them(root, name):
    first, *others = BLOCKS[name]
    for other in others:
        assert block(root, other, name) == block(root, first, name), f"{name} of {other} differs"
    assert len(block(root, first, name)) > 500
    for file in set(CLASSES) - set(BLOCKS[name]):
        assert f"# --- {name}:" not in (root / file).read_text(encoding="utf-8"), file


def test_model_files_import_only_the_standard_library_and_torch(root):
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for file in CLASSES:
        for node in ast.parse((root / file).read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, f"{file}: {names}"


def test_goldens_are_small(golden):
    assert 1e6 < sum(path.stat().st_size for path in golden.rglob("*") if path.is_file()) < 12e6


def test_no_file_names_one_device_or_runs_what_it_reads(root):
    bad = re.compile(r"\.cuda\(\)|weights_only\s*=\s*False|(?<![\w.])eval\(|triu\([^\n]*inf|except\s*:\s*$", re.M)
    checked = [p for folder in ("", "lineage", "bench") for p in (root / folder).glob("*.py")]
    for path in checked:
        assert not bad.findall(path.read_text(encoding="utf-8")), path
    assert len(checked) >= 1
