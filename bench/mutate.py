"""Put small faults into the code, one at a time: does a test fail?

    python bench/mutate.py                              # 60 faults in each file of TESTS
    python bench/mutate.py gpt.py rwkv6.py --sites 100 --seed 1

Where a fault can be put is decided by the operators in `variants`, which of these places by the
seed. Each fault runs against the tests of TESTS, the quick ones first, until one fails, in a copy
of the project. tests/test_same.py, which compares text, is not among them, nor are tests of more
than SLOW seconds. The process forks for each fault with torch already imported.

out/mutation keeps what was found: a fault that was caught is not tried again until its file
changes, one that survived is. bench/mutation.log is written anew from it.
"""
import argparse
import ast
import hashlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("gpt", "llama3", "glm4", "rwkv6", "rwkv2", "rwkv3", "rwkv4", "rwkv5")
SHARED = "test_contract test_generate test_loading"
TESTS = {                                    # the tests that see a file, those of its own first
    "gpt.py": f"test_gpt {SHARED} test_teaching", "llama3.py": f"test_llama3 {SHARED}",
    "glm4.py": f"test_glm4 {SHARED}", "rwkv6.py": f"test_rwkv6 {SHARED}",
    **{f"lineage/rwkv{n}.py": f"test_lineage {SHARED}" for n in (2, 3, 4, 5)},
    "tokenizer.py": "test_vocabularies test_tokenizer test_templates test_packing",
    "train.py": "test_train test_packing", "finetune.py": "test_tasks test_finetune test_adapters test_rows",
    "lora.py": "test_tasks test_adapters test_finetune", "rows.py": "test_rows test_finetune",
    "data.py": "test_packing test_train", "checkpoints.py": "test_loading test_gpt test_rwkv6",
    "folder.py": "test_chat test_loading", "templates.py": "test_templates",
    "chat.py": "test_chat", "practice/fast.py": "test_fast", "plan.py": "test_train",
    "process.py": "test_train", "flags.py": "test_train test_finetune test_chat",
}
EQUIVALENT = json.loads((ROOT / "bench/mutation_equivalent.json").read_text(encoding="utf-8"))

COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn,
           ast.NotIn: ast.In}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
              ast.Pow: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
              ast.LShift: ast.RShift, ast.RShift: ast.LShift}
SLOW = 5.0                                   # tests of more seconds are left out
UNORDERED = {"min", "max", "equal", "startswith", "endswith", "isinstance", "gcd"}


def variants(node: ast.AST, modules: set[str]):
    """Yield (operator, what stands in place of the node as source)."""
    text = ast.unparse
    match node:
        case ast.Compare(left, [operator], [right]) if type(operator) in COMPARE:
            yield "compare", text(ast.Compare(left, [COMPARE[type(operator)]()], [right]))
        case ast.BinOp(left, operator, right) if type(operator) in ARITHMETIC:
            yield "arithmetic", text(ast.BinOp(left, ARITHMETIC[type(operator)](), right))
        case ast.BoolOp(operator, values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield "and, or", text(ast.BoolOp(other, values))
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "sign", text(operand)
        case ast.Constant(bool(value)):
            yield "constant", str(not value)
        case ast.Constant(int(value)):
            yield "constant", str(value + 1)
        case ast.Constant(float(value)):
            yield "constant", repr(2 * value or 1.0)
        case ast.Constant(str(value)) if value and not re.search(r"\s", value):
            yield "string", repr(value + "x")
        case ast.IfExp(test, body, orelse):
            yield "condition", text(ast.IfExp(test, orelse, body))
        case ast.Tuple(values) if len(values) > 1:
            for i, (a, b) in enumerate(zip(values, values[1:])):
                if text(a) != text(b) and not {type(a), type(b)} & {ast.Starred}:
                    yield "order", text(ast.Tuple([*values[:i], b, a, *values[i + 2:]], node.ctx))
        case ast.Call(function, values, keywords):
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            for i, (a, b) in enumerate(zip(values, values[1:])):
                if name not in UNORDERED and not {type(a), type(b)} & {ast.Starred}:
                    yield "order", text(ast.Call(function, [*values[:i], b, a, *values[i + 2:]],
                                                 keywords))
            for i, keyword in enumerate(keywords):
                if keyword.arg:
                    yield "keyword", text(ast.Call(function, values, keywords[:i] + keywords[i + 1:]))
            if isinstance(function, ast.Attribute) and text(function.value) not in modules:
                yield "call", text(function.value)
        case ast.AugAssign(target, operator, value):
            yield "statement", "pass"
            if type(operator) in ARITHMETIC:
                yield "arithmetic", text(ast.AugAssign(target, ARITHMETIC[type(operator)](), value))
        case ast.Raise() | ast.Assert() | ast.Continue() | ast.Break() | ast.Expr(ast.Call()):
            yield "statement", "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield "statement", "pass"


def faults(source: str):
    """Every fault that can be put into a file: [(line, operator, old, new, the whole source)].

    Not touched: docstrings, annotations, imports, decorators, what is printed, and what an error
    says; strings with blanks; the order of what has none (arguments of `UNORDERED`, tuples in loops
    and after `in`).
    """
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    modules = {alias.asname or alias.name for node in ast.walk(tree)
               if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    found = []

    def visit(node, loop=False):
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
            return
        span = slice(starts[node.lineno - 1] + node.col_offset,
                     starts[node.end_lineno - 1] + node.end_col_offset) if hasattr(node, "lineno") else None
        said = isinstance(node, ast.Raise) or isinstance(node, ast.Call) and ast.unparse(
            node.func) in ("print", "sys.exit", "warnings.warn", "sys.stderr.write")
        if span and not (loop and isinstance(node, (ast.Tuple, ast.List))):
            old, whole = source.encode()[span].decode(), source.encode()
            for operator, new in variants(node, modules):
                put = new if isinstance(node, ast.stmt) else f"({new})"
                made = (whole[:span.start] + put.encode() + whole[span.stop:]).decode()
                found.append((node.lineno, operator, " ".join(old.split()), new, made))
        if isinstance(node, (ast.If, ast.While)) and not isinstance(node.test, (ast.Compare, ast.Constant)):
            test = ast.get_source_segment(source, node.test)
            a = starts[node.test.lineno - 1] + node.test.col_offset
            whole = source.encode()
            made = whole[:a] + f"(not ({test}))".encode() + whole[a + len(test.encode()):]
            found.append((node.lineno, "condition", " ".join(test.split()), "not ...", made.decode()))
        if said:
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                documents = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if isinstance(child, ast.AST) and not documents:
                    visit(child, isinstance(node, (ast.For, ast.comprehension)) and name == "iter" or
                          isinstance(node, ast.Compare) and name == "comparators" or
                          isinstance(node, ast.Call) and name == "args" and getattr(
                              node.func, "attr", "") in UNORDERED)
    visit(tree)
    return found


def draw(source: str, sites: int, seed) -> tuple[list, int]:
    """`sites` of the faults, and how many there are; those that Python would not read are redrawn."""
    every, drawn = faults(source), []
    for fault in random.Random(seed).sample(every, len(every)):
        try:
            if len(drawn) < sites and ast.dump(ast.parse(fault[-1])) != ast.dump(ast.parse(source)):
                drawn.append(fault)
        except SyntaxError:
            pass
    return drawn, len(every)


class Order:
    """A pytest plugin: leaves out other models' cases, runs the quick first, keeps what happened."""

    def __init__(self, file: str, base: dict):
        self.model, self.seconds, self.broken = Path(file).stem, base.get("seconds", {}), base.get("failed", ())
        self.took, self.failed = Counter(), []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        def of_another(item):
            case = set(re.findall(r"\w+", item.nodeid.partition("[")[2]))
            return self.model in MODELS and case & {*MODELS} and self.model not in case
        place = {item.path: i for i, item in reversed([*enumerate(items)])}
        items[:] = sorted((item for item in items if not of_another(item)
                           and item.nodeid not in self.broken and self.seconds.get(item.nodeid, 0.0) < SLOW),
                          key=lambda item: (self.seconds.get(item.nodeid, 0.0) > 0.5, place[item.path],
                                            self.seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_setup(self, item):    # a fault may loop: that ends the process
        signal.setitimer(signal.ITIMER_PROF, 5 + 5 * self.seconds.get(item.nodeid, 50.0))

    def pytest_runtest_logreport(self, report):
        self.took[report.nodeid] += report.duration
        self.failed += [report.nodeid] * report.failed

    def pytest_collectreport(self, report):
        self.failed += [report.nodeid] * report.failed


def start(folder: Path, file: str, source: str, base: dict) -> int:
    """Fork a process that runs the tests of a file with this source, up to the first that fails,
    or all if there is no `base`, the report of such a run; its id. It writes a report."""
    (folder / file).write_text(source, encoding="utf-8")
    (folder / "report.json").unlink(missing_ok=True)
    if pid := os.fork():
        return pid
    os.setsid()                              # its own group: it is ended with what it started
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sink = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1), os.dup2(sink, 2)
    before, order = {*sys.modules}, Order(file, base)
    tests = [f"tests/{name}.py" for name in TESTS[file].split() if Path(f"tests/{name}.py").exists()]
    status = pytest.main([*["-x"] * bool(base), "-q", "--tb=line", "--assert=plain", "-p", "no:cacheprovider", *tests],
                         plugins=[order])
    outside = [name for name in {*sys.modules} - before if getattr(sys.modules[name], "__file__", None)
               and str(folder) not in sys.modules[name].__file__]
    (folder / "report.json").write_text(json.dumps(
        dict(status=int(status), failed=order.failed, seconds=order.took, modules=outside)))
    sys.stdout.flush()
    os._exit(0)


def finish(pid: int, folder: Path, limit: float) -> dict | None:
    """What a started process reported; None if it is still running and `limit` lies ahead."""
    if os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() < limit:
            return None
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return dict(status=1, failed=["timeout"], seconds={})
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.exists() else dict(
        status=1, failed=["died, or was ended as it took 5 times as long"], seconds={})


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    middle, spread = hits + z * z / 2, z * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return (middle - spread) / (count + z * z), (middle + spread) / (count + z * z)


def key(source_lines, fault) -> str:
    """What a fault is called: it stays the same when lines are added above it."""
    line, operator, old, new, _ = fault
    return f"{source_lines[line - 1].strip()} | {operator} | {old} -> {new}"


def run(file: str, sites: int, seed: int, folders: list[Path], kept: Path, timeout: float | None) -> None:
    """Try a file's faults, `len(folders)` at a time; what is found goes to `kept`."""
    source = (ROOT / file).read_text(encoding="utf-8")
    sha = hashlib.sha256(source.encode()).hexdigest()[:12]
    drawn, possible = draw(source, sites, f"{seed} {file}")
    state = json.loads(kept.read_text()) if kept.exists() else {}
    if state.get("sha") != sha:
        state = dict(sha=sha, found={})
    lines = source.splitlines()
    state |= dict(possible=possible, seed=seed, drawn=[[key(lines, fault), fault[0]] for fault in drawn])
    pid = start(folders[0], file, source, {})
    while not (base := finish(pid, folders[0], math.inf)):
        time.sleep(0.05)
    if base["status"] not in (0, 1):
        sys.exit(f"{file}: its tests do not run: {(folders[0] / 'output.txt').read_text()[-300:]}")
    for test in base["failed"]:
        print(f"left out, as it fails without any fault: {test}")
    for name in base["modules"]:             # transformers' models, say: once for all that fork
        try:
            importlib.import_module(name)
        except Exception:                    # a module that wants to be imported in its own way
            pass
    total = sum(base["seconds"].values())
    print(f"{file}: {possible} possible faults, {len(drawn)} drawn; {len(base['seconds'])} tests, "
          f"{total:.0f} s")
    running = {}
    waiting = [fault for fault in drawn if state["found"].get(key(lines, fault), ["survived"])[0] == "survived"
               and key(lines, fault) not in EQUIVALENT.get(file, {})]
    while waiting or running:
        for folder in folders:
            if waiting and folder not in running:
                fault = waiting.pop()
                limit = time.monotonic() + (timeout or 30 + 3 * total)
                running[folder] = start(folder, file, fault[-1], base), fault, limit
        for folder, (pid, fault, limit) in [*running.items()]:
            if report := finish(pid, folder, limit):
                del running[folder]
                outcome = "killed" if report["status"] else "survived"
                by = (report["failed"] or [""])[0]
                state["found"][key(lines, fault)] = [outcome, fault[0], by]
                kept.write_text(json.dumps(state))
                print(f"{outcome:8} {file}:{fault[0]} {fault[1]}: {fault[2]:.60} -> {fault[3]:.60}  "
                      f"{by}", flush=True)
        time.sleep(0.01)


def log(folder: Path) -> str:
    """bench/mutation.log: per file the share of faults that a test caught, then what survived."""
    told = [f"python bench/mutate.py; torch {torch.__version__}, Python {sys.version.split()[0]}",
            "A fault is put into one place of a file at a time; caught: one of the file's tests fails.",
            f"tests/test_same.py and tests of more than {SLOW:g} s do not count. [ ] is the 95 % interval (Wilson) of the share.", ""]
    below = []
    for kept in sorted(folder.glob("*.json")):
        state, file = json.loads(kept.read_text()), kept.stem.replace("+", "/")
        drawn = dict(state["drawn"])
        names = {name: line for name, line in drawn.items()
                 if name in state["found"] or name in EQUIVALENT.get(file, {})}
        same = {name: why for name, why in EQUIVALENT.get(file, {}).items() if name in names}
        left = [name for name in names if name not in same
                and state["found"][name][0] == "survived"]
        count = len(names) - len(same)
        low, high = wilson(count - len(left), count)
        told.append(f"{file:20} {len(names):3} of {len(drawn)} drawn of {state['possible']} possible "
                    f"(seed {state['seed']}): "
                    f"{count - len(left)} caught of {count}, {(count - len(left)) / max(count, 1):.1%} "
                    f"[{low:.1%}, {high:.1%}]; {len(same)} change nothing")
        if left or same:
            below += ["", file, *(f"  survived, line {names[name]}: {name}" for name in left),
                      *(f"  changes nothing, line {names[name]}: {name}\n      {why}"
                        for name, why in same.items())]
    return "\n".join(told + below) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", default=[*TESTS], metavar="FILE", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--sites", type=int, default=60, help="faults to draw in each file (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    parser.add_argument("--timeout", type=float, help="seconds for one fault (30 + 3 times the tests')")
    asked = parser.parse_args()
    if unknown := [file for file in asked.files if file not in TESTS]:
        parser.error(f"{unknown[0]} has no tests here: choose from {', '.join(TESTS)}")
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended; the same command goes on"))
    kept, logged = ROOT / "out/mutation", ROOT / "bench/mutation.log"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(n)) for n in range(asked.jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        try:
            for file in asked.files:
                run(file, asked.sites, asked.seed, folders, kept / f"{file.replace('/', '+')}.json", asked.timeout)
                for folder in folders:
                    shutil.copy2(ROOT / file, folder / file)
        finally:
            logged.write_text(log(kept), encoding="utf-8")
    print(logged.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
