"""Rows to fine-tune on: those of files, and the default ones, from Python's standard library."""
import ast
import contextlib
import csv
import io
import random
import textwrap
import tokenize
import warnings

import data
import train

# ------------------------------------------------------------------------------------ rows of files


def read_rows(paths: list[str], encoding: str | None = None) -> list[dict]:
    """The rows of JSON, JSON lines, parquet, .csv, .tsv and .txt files; "where" tells the place."""
    rows = []
    for path in data.find_files(paths, encoding, any_rows=True)[0]:
        if data.kind_of(path) != "text":
            found = data.read_rows(path, encoding)
        else:
            with data.open_text(path, encoding) as file:
                found = text_rows(path, file.read())
        for where, row in found:
            if not isinstance(row, dict):
                raise ValueError(f"{where}: an object is needed, not {row!r:.60}")
            rows.append({**row, "where": where})
    return rows


def text_rows(path, content: str) -> list[tuple[str, dict]]:
    """(place, row) of a table, or of each line of a .txt."""
    kind, lines = path.name.lower().removesuffix(".gz")[-4:], content.removesuffix("\n").split("\n")
    if kind not in (".csv", ".tsv", ".txt"):
        raise ValueError(f"{path} cannot be read: take .jsonl, .json, .parquet, .csv or .tsv; .txt "
                         "for --predict")
    try:
        found = (table_rows(content, delimiter=",") if kind == ".csv" else
                 tab_separated(content, lines) if kind == ".tsv" else
                 [(n, {"text": line}) for n, line in enumerate(lines, 1)])
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return [(f"{path}, line {n}", row) for n, row in found]


def table_rows(content: str, **form) -> list[tuple[int, dict]]:
    """(line, row) of a table whose first line has the names."""
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(io.StringIO(content, newline=""), strict=True, **form)
    return [(table.line_num, row) for row in table]


def tab_separated(content: str, lines: list[str]) -> list[tuple[int, dict]]:
    """(line, row) of a .tsv file, where quotes may be only characters; two columns without names
    are label and text, as in the SMS Spam Collection."""
    names = [name.strip('"') for name in lines[0].split("\t")]
    if len(names) == 2 and not {"text", "label"} & set(names):
        return [(n, dict(zip(("label", "text"), line.split("\t", 1))))
                for n, line in enumerate(lines, 1)]
    try:
        return table_rows(content, delimiter="\t")
    except csv.Error:
        return table_rows(content, delimiter="\t", quoting=csv.QUOTE_NONE)

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


def code_reward(prompt: str, completions: list[str], ended: list[bool]) -> list[float]:
    """1 for each completion that makes Python of the prompt, ended by itself, and has at least two
    statements that its group did not have yet; else 0."""
    rewards, seen = [], set()
    for completion, end in zip(completions, ended):
        new = (statements(prompt + completion) or set()) - seen if end else set()
        rewards.append(float(len(new) >= 2))
        seen |= new
    return rewards
