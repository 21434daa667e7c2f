"""What README.md and lineage/README.md say is there, is there: files, flags, tests, logs, numbers."""
import contextlib
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import train

READMES = pytest.mark.parametrize("readme", ["README.md", "lineage/README.md"])
SCRIPTS = ("train.py", "finetune.py", "chat.py", "tokenizer.py", *(
    f"bench/{file.name}" for file in sorted((ROOT / "bench").glob("*.py"))), "tests/selfcheck.py", *(
    f"practice/{file.name}" for file in sorted((ROOT / "practice").glob("*.py"))
    if "__main__" in file.read_text(encoding="utf-8")))
OF_OTHERS = {"--assets", "--stress", "--nproc-per-node", "--dequantize", "--hf"}    # pytest's, torchrun's, converters'


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def ours(word):
    """The script that a word of a command names: a file, or a module after -m."""
    return next((word for word in (word, word.replace(".", "/") + ".py") if word in SCRIPTS), None)


def commands(readme):
    """(the script, the words after it) of every command in the code blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", read(readme), re.S)
    blocks += re.findall(r"(?:^    (?:python|pytest) .*\n)+", read(readme), re.M)
    blocks += [found for found in re.findall(r"`((?:\.venv/bin/)?(?:python|torchrun|pytest) [^`]+)`", read(readme))]
    for line in "\n".join(blocks).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            for i, word in enumerate(words):
                if ours(word):
                    yield ours(word), words[i + 1:]
                    break


@pytest.fixture(scope="module")
def helps():
    """script -> what its --help prints."""
    @contextlib.contextmanager
    def arguments(*words):
        before = sys.argv
        sys.argv = [*words]
        try:
            yield
        finally:
            sys.argv = before
    found = {}
    for script in SCRIPTS:
        name = {"tokenizer.py": "data", "tests/selfcheck.py": "selfcheck"}.get(
            script, script.removesuffix(".py").replace("/", "."))
        out = io.StringIO()
        with arguments(script, "--help"), contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            importlib.import_module(name).main()
        assert ended.value.code in (0, None), script
        found[script] = out.getvalue()
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_every_script_says_what_it_is_for(helps, script):
    told = helps[script]
    assert told.startswith("usage:") and len(told.splitlines()) > 5
    assert "--help" in told


@READMES
def test_every_script_and_flag_in_a_command_exists(readme, helps):
    seen = 0
    for script, words in commands(readme):
        for flag in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", " ".join(words)):
            assert re.search(rf"{flag}\b(?!-)", helps[script]), f"{readme}: {script} has no {flag}"
            seen += 1
    assert seen > (20 if readme == "README.md" else 3)


@READMES
def test_every_flag_in_the_text_is_one_of_some_script(readme, helps):
    known = " ".join(helps.values())
    for flag in {*re.findall(r"`[^`\n]*?(--[a-z][\w-]+)[^`\n]*`", read(readme))} - OF_OTHERS:
        assert re.search(rf"{flag}\b(?!-)", known), f"{readme}: no script has {flag}"


@READMES
def test_links_and_named_files_exist(readme):
    folder, text = (ROOT / readme).parent, read(readme)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{readme} links to {target}"
    named = {*re.findall(r"`((?:bench|tests|lineage|practice)/[\w./-]*)`", text)}
    named |= {word for word in re.findall(r"`([\w/]+\.(?:py|log))`", text)}
    known = {file.name for file in ROOT.rglob("*.py")} | {"rwkv_state_merger.py", "llm.py"}
    for name in named:
        places = (ROOT / name, folder / name)
        assert any(place.exists() for place in places) or name in known, f"{readme} names {name}"
    assert len(named) > (15 if readme == "README.md" else 3)


def all_tests():
    return {name for file in (ROOT / "tests").glob("test_*.py")
            for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}


@READMES
def test_every_test_that_is_cited_exists(readme):
    cited = {*re.findall(r"`(test_\w+)`", read(readme))}
    assert cited <= all_tests(), cited - all_tests()
    if readme == "README.md":
        assert len(cited) > 15


def table(text, header):
    """The rows of the table whose first line begins so."""
    lines = text[text.index(header):].splitlines()
    rows = lines[2:next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_equality_cites_a_test_and_every_measured_number_a_log():
    text = read("README.md")
    for equal, tests in table(text, "| equal | test |"):
        cited = re.findall(r"`(test_\w+)`", tests)
        assert cited and {*cited} <= all_tests(), equal
    log = None
    for what, figure, source in table(text, "| what | figure |"):
        if source != "the same":
            [log] = re.findall(r"`(bench/\w+\.log)`", source)
            assert re.search(r"`python bench/\w+\.py", source), what
        assert read(log).strip() and re.search(r"\d", figure), what


def test_the_numbers_of_the_lineage_are_those_of_its_log():
    log = re.sub(r"[*`]", "", read("bench/lineage.log")).replace("x ", "× ")
    logged = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]]
              for row in log.splitlines() if re.match(r"\| (wkv|gpt|rwkv)", row)}
    text = read("lineage/README.md")
    for name, *cells in table(text, "| | forward |")[1:] if "| | forward |" in text else []:
        if name.strip("`") in logged:
            assert [cell.strip("*") for cell in cells] == logged[name.strip("`")], name
    rows = table(text, "| model | width |")
    assert len(rows) == 6
    for name, *cells in rows:
        for told, full in zip(cells, logged[name]):
            assert told == full or abs(float(told) - float(full)) <= 0.00051, (name, told, full)


def test_the_sizes_in_the_table_are_those_of_the_models():
    """All names; bf16 is two bytes a parameter, of which the comments in `SIZES` have the number,
    which other tests compare with the models."""
    rows = table(read("README.md"), "| model and size |")
    told = {tuple(row[0].replace("`", "").split()): row for row in rows}
    known = {(model, name) for model in train.MODELS for name in train.model_parts(model)[2]}
    assert known - {*told} == {("rwkv2", "enwik8")} and {*told} <= known
    for (model, name), (_, _, disk, bf16, int8, int4) in told.items():
        module = train.model_parts(model)[0].__module__
        source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
        count = re.search(rf'"{re.escape(name)}": .*?# ([\d,]+)', source, re.S)[1].replace(",", "")
        digits = len(bf16.partition(".")[2])
        assert abs(float(bf16) - 2 * int(count) / 1e9) <= 0.51 * 10**-digits, (model, name)
        assert float(disk) >= float(bf16) > float(int8) > float(int4), (model, name)
