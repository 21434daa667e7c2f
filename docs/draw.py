"""Draws docs/*.svg: the block of each model, as its code computes it, and the family.

    python docs/draw.py

A block is run once on the meta device, at a published size. Each call that has a parameter is a
box, under the parameter's name; so are activations, attention and the operators of the model file.
What tensor came from which box is followed through everything else: nothing is drawn by hand, and
a test finds pictures that are not those of the code.
"""
import dataclasses
import html
import importlib
import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from checkpoints import MODELS, model_parts  # noqa: E402

AROUND = -9                                  # column of the residual stream, left of all others
SHOWN = {"gpt": "gpt2", "llama3": "llama3-8b", "glm4": "glm-4-9b", "rwkv6": "7b",
         "rwkv2": "430m", "rwkv3": "430m", "rwkv4": "7b", "rwkv5": "7b"}       # of SIZES
ACTIVATIONS = {"silu", "gelu", "relu", "sigmoid", "tanh", "exp", "pow",
               "scaled_dot_product_attention"}
OPERATORS = {"rotate", "previous", *(f"wkv{n}" for n in (2, 3, 4, 5, 6))}      # of the model files


@dataclasses.dataclass(eq=False)
class Box:
    """One step of a block. sources: the boxes whose results it reads."""
    name: str
    note: str = ""
    group: str = ""                          # the module of the block that it belongs to
    sources: tuple = ()
    rank: int = 0
    column: float = 0.0

    def ancestors(self) -> set:
        return {self}.union(*(source.ancestors() for source in self.sources))


class Recorder(TorchFunctionMode):
    """Records what a block computes, as boxes."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.names = {id(p): name for name, p in block.named_parameters()}
        self.modules = {id(module): name for name, module in block.named_children()}
        self.boxes, self.came, self.alive, self.group, self.quiet = [], {}, [], "", 0

    def mark(self, result, boxes: tuple) -> None:
        """Results are tensors or tuples of them."""
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.came[id(tensor)] = boxes
                self.alive.append(tensor)    # or another tensor might get its id

    def sources(self, arguments) -> tuple:
        """The boxes behind arguments, as `latest` of them."""
        return latest([box for tensor in flat(arguments) for box in self.came.get(id(tensor), ())])

    def add(self, name, note, sources, result) -> None:
        last = sources[0] if len(sources) == 1 else None
        if last and last.name == name and last.group == self.group:     # its weight, then its bias
            return self.mark(result, sources)
        self.boxes.append(Box(name, note, self.group, sources))
        self.mark(result, (self.boxes[-1],))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.quiet:
            return result
        given = [args, *(kwargs or {}).values()]
        sources, name = self.sources(given), getattr(func, "__name__", "")
        parameters = [self.names[id(t)] for t in flat(given) if id(t) in self.names]
        if name == "__get__" and parameters:             # .data, .T and others of a parameter
            self.names[id(result)] = parameters[0]
            self.alive.append(result)
        elif parameters and not sources and isinstance(result, Tensor):
            self.names[id(result)] = parameters[0]       # a parameter viewed or cast
            self.alive.append(result)
        elif parameters and sources:
            matrix = next((t for t in flat(given) if id(t) in self.names and t.dim() == 2), None)
            path = parameters[0].removesuffix(".weight").removesuffix(".bias")
            path = path.removeprefix(self.group + ".")
            shape = () if matrix is None else matrix.shape
            note = " → ".join(f"{n:,}" for n in (shape[::-1] if name == "linear" else shape))
            self.add(path, note, sources, result)
        elif name in ACTIVATIONS and sources:
            note = heads_of(*args[:2]) if name.startswith("scaled") else ""
            self.add({"pow": "square"}.get(name, name), note, sources, result)
        elif self.is_sum(name) or self.is_gate(name, args):
            both = tuple(box for tensor in args for box in self.came[id(tensor)])
            self.add("+" if self.is_sum(name) else "×", "", both, result)
        elif name == "add" and len({box.name for box in sources}) == 1 < len(sources):
            first, last = sources            # x m + x' (1 - m): one blend, one box
            last.sources = latest(first.sources + last.sources)
            self.boxes.remove(first)
            self.mark(result, (last,))
        else:
            self.mark(result, sources)
        return result

    def is_sum(self, name: str) -> bool:
        """Whether it adds to the residual stream: the block itself does, none of its modules."""
        return name in ("add", "__add__") and not self.group

    def is_gate(self, name: str, args: tuple) -> bool:
        """Whether it is a product of what two different boxes computed."""
        came = [self.came.get(id(argument)) for argument in args]
        return name in ("mul", "__mul__") and None not in came and came[0] != came[1]

    def operator(self, function):
        """A function of the model file as one box."""
        def recorded(*args, **kwargs):
            if self.quiet:
                return function(*args, **kwargs)
            sources = self.sources([args, *kwargs.values()])
            self.quiet = 1
            result = function(*args, **kwargs)
            self.quiet = 0
            note = heads_of(args[0]) if function.__name__.startswith("wkv") else ""
            self.add(function.__name__, note, sources, result)
            return result
        return recorded


def latest(boxes) -> tuple:
    """Boxes, each once, without those that others among them have read."""
    boxes = dict.fromkeys(boxes)
    return tuple(box for box in boxes
                 if not any(box in other.ancestors() for other in boxes if other is not box))


def flat(arguments):
    """The tensors in nested arguments."""
    for argument in arguments if isinstance(arguments, (tuple, list)) else [arguments]:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (tuple, list)):
            yield from flat(argument)


def heads_of(q: Tensor, k: Tensor | None = None) -> str:
    """What the shape (B, H, T, D) of an operator's argument says."""
    if q.dim() < 4:
        return f"{q.shape[-1]:,} channels"
    shared = "" if k is None or k.shape[1] == q.shape[1] else f", {k.shape[1]} of k and v"
    return f"{q.shape[1]} heads of {q.shape[3]}{shared}"


def record(name: str) -> tuple[list[Box], str]:
    """(the boxes of a model's second block, the name of its size)."""
    model_class, _, sizes = model_parts(name)
    config, module = sizes[SHOWN[name]], importlib.import_module(MODELS[name][0])
    layers = next(field.name for field in dataclasses.fields(config) if "layer" in field.name
                  and type(getattr(config, field.name)) is int)
    with torch.device("meta"):
        model = model_class(dataclasses.replace(config, **{layers: 2})).eval()
        tokens = torch.zeros(1, 8, dtype=torch.int64)
    block = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)[1]
    recorder = Recorder(block)
    stream = Box("x", "the residual stream")
    recorder.boxes.append(stream)
    recorder.quiet = 1                       # until the block begins

    def begin(module, args):
        recorder.mark(args[0], (stream,))
        recorder.quiet = 0

    def end(module, args, result):
        recorder.quiet = 1
        recorder.boxes.append(Box("x", "to the next block", "", recorder.came[id(result)]))
    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end)
    for child, inside in block.named_children():
        if [*inside.children()]:             # attention or MLP: its calls are one group
            inside.register_forward_pre_hook(
                lambda *_, child=child: setattr(recorder, "group", child))
            inside.register_forward_hook(lambda *_: setattr(recorder, "group", ""))
    kept = {key: value for key, value in vars(module).items() if key in OPERATORS
            and inspect.isfunction(value) and value.__module__ == module.__name__}
    try:
        for key, function in kept.items():
            setattr(module, key, recorder.operator(function))
        with recorder, torch.no_grad():
            model.hidden(tokens)
    finally:
        vars(module).update(kept)
    return recorder.boxes, SHOWN[name]


def arrange(boxes: list[Box]) -> list[tuple[Box, Box, list[Box]]]:
    """Give each box its rank and column; returns the lines (from, to, the points between)."""
    lines, rows = [], {}
    for box in boxes:
        box.rank = 1 + max((source.rank for source in box.sources), default=-1)
    for box in boxes:
        rows.setdefault(box.rank, []).append(box)
    points = {}                              # box or point -> what it hangs from
    for box in boxes:
        points[box] = []
        for source in dict.fromkeys(box.sources):
            passing = [Box("", rank=rank) for rank in range(source.rank + 1, box.rank)]
            for point, above in zip(passing, [source, *passing]):
                points[point] = [above]
                point.column = AROUND if box.name == "+" else 0
                rows[point.rank].append(point)
            points[box].append(passing[-1] if passing else source)
            lines.append((source, box, passing))
    below = {point: [p for p in points if point in points[p]] for point in points}
    for _ in range(8):
        for neighbours, order in ((points, sorted(rows)), (below, sorted(rows, reverse=True))):
            for rank in order:
                row = rows[rank]
                row.sort(key=lambda p: AROUND if p.column == AROUND else (
                    sum(n.column for n in neighbours[p] if n.column != AROUND)
                    / max(1, sum(n.column != AROUND for n in neighbours[p]))))
                free = [p for p in row if p.column != AROUND]
                for place, point in enumerate(free):
                    point.column = place - (len(free) - 1) / 2
    return lines


def text(x, y, words, size=12, **style) -> str:
    styles = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}"{styles}>{html.escape(words)}</text>')


def picture(width: float, height: float, parts: list[str]) -> str:
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>', *parts, "</svg>", ""])


def draw_block(name: str) -> str:
    """The picture of one model's block."""
    boxes, size = record(name)
    lines = arrange(boxes)
    wide = max(118, *(max(7 * len(box.name), 6 * len(box.note)) + 16 for box in boxes))
    step, high, gap = wide + 14, 34, 54
    free = [box.column for box in boxes]
    free += [p.column for *_, between in lines for p in between if p.column != AROUND]
    left = 70 - min(free) * step + wide / 2
    width = left + max(free) * step + wide / 2 + 40

    def place(box):
        return (30 if box.column == AROUND else left + box.column * step), 62 + box.rank * gap
    parts = [text(20, 26, f"{FAMILY[name][0]}, a block at the size {size}", 15, font_weight="bold")]
    for group in dict.fromkeys(box.group for box in boxes if box.group):
        inside = [place(box) for box in boxes if box.group == group]
        x0, x1 = (f(x for x, _ in inside) for f in (min, max))
        y0, y1 = (f(y for _, y in inside) for f in (min, max))
        parts.append(f'<rect x="{x0 - wide / 2 - 8:g}" y="{y0 - high / 2 - 6:g}" '
                     f'width="{x1 - x0 + wide + 16:g}" height="{y1 - y0 + high + 12:g}" rx="10" '
                     'fill="#f1f4f9" stroke="#c3ccd9"/>')
        parts.append(text(x1 + wide / 2 + 2, y0 - high / 2 - 9, group, 12, text_anchor="end",
                          fill="#5a6b85", font_style="italic"))
    for source, box, between in lines:
        (x0, y0), (x1, y1) = place(source), place(box)
        down, across = (11, 11) if source.name in "+×" else (high / 2, wide / 2)
        path = [(x0, y0 + down), *map(place, between),
                (x1, y1 - (11 if box.name in "+×" else high / 2))]
        if between and between[0].column == AROUND:      # around, into the sum from its side
            path = [(x0 - across, y0), (30, y0), (30, y1), (x1 - 11, y1)]
        d = "M" + "L".join(f"{x:g} {y:g}" for x, y in path)
        parts.append(f'<path d="{d}" fill="none" stroke="#555" stroke-width="1.2" '
                     'marker-end="url(#end)"/>')
    for box in boxes:
        x, y = place(box)
        if box.name in "+×":
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="#fff" stroke="#333"/>')
            parts.append(text(x, y + 5, box.name, 16, text_anchor="middle"))
            continue
        kind = ("#ffffff" if box.name == "x" else
                "#fde3c8" if box.name in OPERATORS | ACTIVATIONS | {"square"} else
                "#cfe3f7" if box.note else "#e6e9ee")
        parts.append(f'<rect x="{x - wide / 2:g}" y="{y - high / 2:g}" width="{wide:g}" '
                     f'height="{high}" rx="5" fill="{kind}" stroke="#333" stroke-width="0.8"/>')
        parts.append(text(x, y - 2 if box.note else y + 4, box.name, 12, text_anchor="middle"))
        if box.note:
            parts.append(text(x, y + 12, box.note, 10, text_anchor="middle", fill="#444"))
    height = 62 + max(box.rank for box in boxes) * gap + 30
    return picture(width, height, parts)


FAMILY = {      # model -> its name, column, row, of which it departs, how
    "gpt": ("GPT-2", 0, 0, "", (
        "the plain decoder:", "learned positions, LayerNorm,", "attention, MLP with GELU")),
    "llama3": ("Llama 3", 1, 0, "gpt", (
        "rotary positions;", "query heads share k and v;", "RMSNorm, SwiGLU, no biases")),
    "glm4": ("GLM-4", 2, 0, "llama3", (
        "half of each head rotated;", "2 groups of k and v, biases;", "0414: two more norms")),
    "rwkv2": ("RWKV-2", 0, 1, "gpt", (
        "no attention: sums of the", "past that fade; blends of a", "token with the one before")),
    "rwkv3": ("RWKV-3", 1, 1, "rwkv2", (
        "k, v, r blend each in", "its own way; norms before", "each half of a block")),
    "rwkv4": ("RWKV-4", 2, 1, "rwkv3", (
        "exact means, by a", "running maximum:", "nothing is clamped")),
    "rwkv5": ("RWKV-5", 3, 1, "rwkv4", (
        "a matrix for each head", "instead of two sums for", "each channel")),
    "rwkv6": ("RWKV-6", 4, 1, "rwkv5", (
        "decay and blends are", "computed from the token")),
}


def draw_family() -> str:
    """Which architecture departs from which, and how."""
    wide, high = 190, 92
    places = {name: (20 + column * (wide + 34), 20 + row * (high + 40))
              for name, (_, column, row, *_) in FAMILY.items()}
    parts = []
    for name, (title, _, _, parent, how) in FAMILY.items():
        x, y = places[name]
        if parent:
            x0, y0 = places[parent]
            d = (f"M{x0 + wide} {y0 + high / 2:g}H{x - 1}" if y == y0 else
                 f"M{x + wide / 2:g} {y0 + high}V{y - 1}")
            parts.append(f'<path d="{d}" fill="none" stroke="#555" stroke-width="1.5" '
                         'marker-end="url(#end)"/>')
        module = MODELS[name][0]
        fill = "#fde3c8" if title.startswith("RWKV") else "#cfe3f7"
        parts.append(f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" rx="8" '
                     f'fill="{fill}" stroke="#333"/>')
        parts.append(text(x + 10, y + 20, title, 14, font_weight="bold"))
        parts.append(text(x + wide - 10, y + 20, module.replace(".", "/") + ".py", 11,
                          text_anchor="end", fill="#444"))
        parts += [text(x + 10, y + 41 + 17 * i, line, 12) for i, line in enumerate(how)]
    right = max(x for x, _ in places.values()) + wide + 20
    return picture(right, max(y for _, y in places.values()) + high + 20, parts)


def pictures() -> dict[str, str]:
    """file name -> its contents."""
    return {"family.svg": draw_family(), **{f"{name}.svg": draw_block(name) for name in MODELS}}


if __name__ == "__main__":
    for file, content in pictures().items():
        (HERE / file).write_text(content, encoding="utf-8", newline="\n")
        print(HERE / file)
