"""What two processes of tests/test_cluster.py run: each model in shards beside the whole one.

    torchrun --nproc-per-node 2 tests/sharded.py FOLDER       writes FOLDER/report.json
"""
import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cluster                                                          # noqa: E402
from checkpoints import model_parts                                     # noqa: E402
from process import Run                                                 # noqa: E402
from train import NextTokenLoss, make_optimizer, training_step          # noqa: E402

CPU, SEQUENCES, T, V = torch.device("cpu"), 3, 24, 300                   # 3: one process has 2, one 1


def steps(loss, run, optimizer, first, last):
    """[(mean loss, norm of the gradient, targets), ...] of some steps."""
    made, scaler = [], torch.amp.GradScaler("cpu", enabled=False)
    for step in range(first, last):
        tokens = torch.randint(V, (SEQUENCES, T + 1), generator=torch.Generator().manual_seed(step))
        targets = tokens[:, 1:].clone()
        targets[0, :7] = -100                # the processes have unequal numbers of targets
        batches = [{"tokens": tokens[i:i + 1, :-1], "targets": targets[i:i + 1]}
                   for i in range(run.rank, SEQUENCES, run.world)]
        made.append(training_step(run, loss, optimizer, scaler, batches, 1e-2, 1.0, SEQUENCES * T))
    return made


def difference(a, b) -> float:
    """The largest difference of two models' parameters, relative to the largest in each."""
    return max(((p - q).abs().max() / q.abs().max().clamp(min=1e-6)).item()
               for p, q in zip(a.parameters(), b.parameters()))


def compare(name: str, tied: bool, folder: Path, rank: int) -> dict:
    """Three steps whole and in shards, a checkpoint, one step more from it."""
    Model, Config, _ = model_parts(name)
    config = Config.sized(2, 48, V, 32)
    if hasattr(config, "tie_word_embeddings"):
        config = dataclasses.replace(config, tie_word_embeddings=tied)
    run, alone = Run(CPU, torch.float32, rank, 2, sharded=True), Run(CPU, torch.float32)
    torch.manual_seed(0)
    one = NextTokenLoss(Model(config)).train()
    loss = NextTokenLoss(copy.deepcopy(one.model)).train()
    whole = cluster.shard(loss, run)
    ours, theirs = make_optimizer(loss.model, 0.1), make_optimizer(one.model, 0.1)
    made = {"losses": steps(loss, run, ours, 0, 3), "expected": steps(one, alone, theirs, 0, 3),
            "held": sum(p.to_local().numel() for p in loss.parameters()),
            "all": sum(p.numel() for p in one.parameters())}
    with cluster.saving(loss, ours, run, folder, 3) as place:
        if rank == 0:
            (place / "resume.pt").write_text("the rest")
    with cluster.gathered(whole, loss, run) as full:
        if rank == 0:
            made["parameters"] = difference(full, one)
            full.model.save_pretrained(folder / "published")
            published = Model.from_pretrained(folder / "published", dtype=torch.float32)
            made["published"] = difference(published, full.model)
    prompt, new = [5, 6, 7], 6
    made["drawn"] = loss.model.generate([prompt], new, temperature=0)
    made["expected_drawn"] = one.model.generate([prompt], new, temperature=0)
    run.out = folder                         # a new model, never whole, and the checkpoint into it
    with torch.device("meta"):
        again = NextTokenLoss(Model(config)).train()
    torch.manual_seed(7)
    empty = cluster.shard(again, run)
    torch.manual_seed(7)
    units = {name: p.full_tensor() for name, p in again.named_parameters()}
    made["initial_std"] = {name: p.std().item() for name, p in units.items() if p.dim() == 2}
    made["whole_std"] = {name: p.std().item() for name, p in NextTokenLoss(Model(config)).named_parameters()
                         if p.dim() == 2}
    resumed = make_optimizer(again.model, 0.1)
    cluster.load_shards(again, resumed, cluster.saved_shards(folder)[-1])
    made["resumed"], made["went_on"] = steps(again, run, resumed, 3, 4), steps(loss, run, ours, 3, 4)
    cluster.load_rows(again, NextTokenLoss(Model.from_pretrained(folder / "published")))
    with cluster.gathered(empty, again, run) as full:
        if rank == 0:
            made["taken_back"] = difference(full.model, published)
    return made


def main():
    dist.init_process_group("gloo")
    folder, report = Path(sys.argv[1]), {}
    for name, tied in (("gpt", True), ("gpt", False), ("llama3", True), ("llama3", False), ("glm4", True),
                       ("glm4", False), ("rwkv6", False)):
        label = f"{name}, {'tied' if tied else 'untied'}"
        report[label] = compare(name, tied, folder / label, dist.get_rank())
        print(label, report[label], flush=True)
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
