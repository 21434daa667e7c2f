"""tests/selfcheck.py names the module that a device computes wrongly, and nothing where none is."""
import pytest
import selfcheck
import torch

BROKEN = {"gpt": "h.1.mlp.gelu", "llama3": "model.layers.1.mlp.up_proj", "glm4": "model.layers.0.self_attn.k_proj",
          "rwkv6": "blocks.1.att.ln_x", "rwkv2": "blocks.1.ffn.key", "rwkv3": "blocks.0.ln1",
          "rwkv4": "blocks.1.att.value", "rwkv5": "blocks.0.att.ln_x"}


def broken(monkeypatch, change):
    """From now on the second model that is loaded in the dtype asked for, the device's, is changed."""
    load, count = selfcheck.load, []

    def second(name, device, dtype):
        model = load(name, device, dtype)
        count.append(name)
        if count.count(name) % 3 == 0:       # the first two: against the official code; the CPU's
            change(name, model)
        return model
    monkeypatch.setattr(selfcheck, "load", second)


@pytest.mark.parametrize("name", ["gpt", "rwkv6"])
def test_the_cpu_computes_in_bf16_what_the_cpu_computes(name):
    right, line = selfcheck.check(name, "cpu", torch.bfloat16)
    assert right and "as on the CPU" in line, line


@pytest.mark.slow
def test_the_cpu_computes_what_the_cpu_computes(capsys):
    assert selfcheck.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(selfcheck.GOLDENS) and all("as on the CPU" in line for line in lines[1:])


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_is_broken_on_purpose_is_named(name, monkeypatch):
    def change(_, model):
        model.get_submodule(BROKEN[name]).register_forward_hook(lambda module, inputs, output: output * 1.01)
    broken(monkeypatch, change)
    right, line = selfcheck.check(name, "cpu", torch.float32)
    assert not right and f"DEVIATES first at a sequence: {BROKEN[name]}:" in line, line


@pytest.mark.parametrize("kind, words", [
    ("nan", "a sequence: h.0.ln_1: by inf"), ("state", "pieces with a state: h.0.attn.c_proj"),
    ("backward", "backward: the gradient of h.1.attn.c_proj.weight")])
def test_nan_a_wrong_state_and_a_wrong_gradient_are_found(kind, words, monkeypatch):
    def change(_, model):
        if kind == "nan":
            model.h[0].ln_1.weight.data[0] = float("nan")
        elif kind == "state":
            new_state = model.new_state
            model.new_state = lambda *sizes: (s := new_state(*sizes))._replace(key=s.key.bfloat16())
        else:
            model.h[1].attn.c_proj.weight.register_hook(lambda grad: grad * 2)
    broken(monkeypatch, change)
    right, line = selfcheck.check("gpt", "cpu", torch.float32)
    assert not right and words in line, line


def test_a_cpu_that_differs_from_the_official_code_is_told(monkeypatch):
    load = selfcheck.load

    def scaled(*how):
        model = load(*how)
        model.ln_f.weight.data.mul_(1.001)
        return model
    monkeypatch.setattr(selfcheck, "load", scaled)
    right, line = selfcheck.check("gpt", "cpu", torch.float32)
    assert not right and "the CPU itself differs" in line

