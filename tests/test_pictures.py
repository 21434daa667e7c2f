"""Pictures: the diagrams are those of the code; loss.png and runs.png of a run."""
import json
import re
import sys

import pytest
from helpers import ROOT, assert_one_line_error, run

import checkpoints

sys.path.insert(0, str(ROOT / "docs"))
import draw  # noqa: E402

CAN_DRAW = checkpoints.can_draw              # conftest.py takes it away


def test_the_committed_diagrams_are_those_of_the_code():
    for file, content in draw.pictures().items():
        committed = (ROOT / "docs" / file).read_text(encoding="utf-8")
        assert committed == content, f"docs/{file} is not of this code: python docs/draw.py"


@pytest.mark.parametrize("name", checkpoints.MODELS)
def test_a_diagram_has_every_parameter_of_a_block(name):
    import torch
    model_class, config_class, _ = checkpoints.model_parts(name)
    with torch.device("meta"):
        model = model_class(config_class.sized(2, 64, 64, 16))
    block = re.compile(r"(?:.*\.)?(?:h|layers|blocks)\.1\.(.*)")
    parameters = {found[1] for key, _ in model.named_parameters() if (found := block.match(key))}
    boxes, _ = draw.record(name)
    drawn = {f"{box.group}.{box.name}".strip(".") for box in boxes}
    inside = {"att.time_faaaa", "att.time_decay", "att.time_first"}    # inside of the operators
    missing = {re.sub(r"\.(weight|bias)$", "", key) for key in parameters} - drawn - inside
    assert not missing


def test_the_family_names_every_model_once():
    assert [*draw.FAMILY] == [*sorted(checkpoints.MODELS, key=[*draw.FAMILY].index)]


def write_run(folder):
    folder.mkdir()
    events = [{"step": 0, "gzip": 2.0, "xz": 1.5}]
    events += [{"step": step, "loss": 8 - step / 20, "lr": 1.0, "tokens_per_s": 9.0}
               for step in range(1, 101)]
    events += [{"step": step, "val_loss": 8 - step / 20, "bits_per_byte": 4 - step / 40}
               for step in (50, 100)]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, events)))
    (folder / "settings.json").write_text('{"tokens_per_step": 10}')
    return folder


def test_loss_png_has_a_smooth_line_bits_per_byte_and_the_compressors(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot
    figures = []
    assert CAN_DRAW()
    monkeypatch.setattr(checkpoints, "can_draw", CAN_DRAW)
    monkeypatch.setattr(pyplot, "close", figures.append)
    out = write_run(tmp_path / "gpt")
    checkpoints.draw_log(out)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    [axes] = figures[-1].axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert abs(lines["training"][49] - (8 - 50 / 20)) < 1e-6           # a mean around each step
    assert lines["gzip: 2.00"][0] == 4.0 and lines["xz: 1.50"][0] == 3.0       # in nats a token
    assert [child.get_ylabel() for child in axes.child_axes] == ["bits per byte"]


def test_plot_writes_into_the_folder_of_the_run(tmp_path):
    pytest.importorskip("matplotlib")
    out = write_run(tmp_path / "gpt")
    process = run("bench/plot.py", out)
    assert process.returncode == 0 and (out / "runs.png").stat().st_size > 1000, process.stderr


def test_without_matplotlib_the_command_that_installs_it_is_named(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    process = run("bench/plot.py", write_run(tmp_path / "gpt"), PYTHONPATH=str(tmp_path))
    assert_one_line_error(process, "matplotlib", "python -m pip install matplotlib")


@pytest.mark.parametrize("drawn", [True, False])
def test_the_closing_lines_say_what_draws_and_what_to_do_with_own_text(tmp_path, capsys, drawn):
    import time

    import torch

    import train
    out = write_run(tmp_path / "gpt")
    if drawn:
        (out / "loss.png").write_bytes(b"")
    run_of = train.Run(torch.device("cpu"), torch.float32, started=time.time(), out=out)
    measures = {"bits_per_byte": 1.9, "gzip": 2.0, "xz": 1.5}
    train.finish(train.Settings(), run_of, 100, measures)
    told = capsys.readouterr().out
    assert "matplotlib" in told and ("pip install matplotlib" in told) != drawn
    assert told.endswith("With your own text: python train.py --data FILE-OR-FOLDER ...\n")
    train.finish(train.Settings(data=["my.txt"]), run_of, 100, measures)
    assert "your own text" not in capsys.readouterr().out
