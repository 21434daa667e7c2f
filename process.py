"""A training process: its device and precision, the other processes, the clock, signals."""
import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from plan import peak_bytes


@dataclass
class Run:
    """This process: its device and precision, its place among the others, its run directory."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    started: float = 0.0                     # when the command was given
    out: Path | None = None                  # set on rank 0 once there is a directory
    sharded: bool = False                    # weights are divided over the processes (cluster.py)
    line: str = ""                           # what a terminal shows until the next line

    def say(self, message: str) -> None:
        """One line of rank 0."""
        if self.rank == 0:
            clear = f"\r{'':{len(self.line)}}\r" if self.line else ""
            print(clear + message, flush=True)
            self.line = ""

    def say_step(self, message: str, step: int, steps: int) -> None:
        """A line about a step: 200 or so in all; on a terminal 20, one between them in place."""
        terminal = sys.stdout.isatty()
        every = max(1, steps // (20 if terminal else 200))
        if step % every == 0 or step in (1, steps):
            self.say(message)
        elif terminal and self.rank == 0:
            print(f"\r{message:{len(self.line)}}", end="", flush=True)
            self.line = message

    def log(self, **event) -> None:
        """One line of log.jsonl."""
        if self.out is not None:
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes; on one process the numbers themselves."""
        if self.world == 1:
            return list(numbers)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(numbers, dtype=exact, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def autocast(self):
        """Where the computation takes place in lower precision, if it does. (FSDP gathers weights
        in it already.)"""
        lower = self.dtype != torch.float32 and not self.sharded
        return torch.autocast(self.device.type, self.dtype, enabled=lower)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where float16 could not hold the gradients; else does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def step_seed(self, seed: int, step: int) -> int:
        """Of what is drawn in a step, by this process: dropout, completions."""
        return (seed * 1_000_003 + step) * self.world + self.rank


def choose_device(asked: str | None) -> torch.device:
    """The device asked for, if it works, or the best there is."""
    best = ("cuda" if torch.cuda.is_available()
            else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked or best)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked} does not work here: "
                         + str(error).splitlines()[0][:150]) from None
    return device


def choose_dtype(device: torch.device, asked: str | None) -> tuple[torch.dtype, str]:
    """The precision of the computation, and why. Parameters and optimiser stay in fp32."""
    if asked == "float16" and device.type != "cuda":
        raise ValueError(f"--dtype float16 on {device.type}: the loss scaling it needs is there on "
                         "CUDA only; take bfloat16 or float32")
    if asked:
        return getattr(torch, asked), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes it fast"
        return torch.float16, "this GPU has no fast bfloat16; the loss is scaled"
    if device.type != "cpu":
        return torch.float32, f"the safe choice on {device.type}"
    a, b, best = torch.randn(1024, 512), torch.randn(512, 512), {}
    for dtype in (torch.float32, torch.bfloat16):
        x, y, times = a.to(dtype), b.to(dtype), []
        while len(times) < 8 and min(times, default=0) <= 4 * best.get(torch.float32, 1):
            times.append(seconds_of(lambda x=x, y=y: x @ y))            # not long where it is slow
        best[dtype] = min(times)
    ratio = best[torch.float32] / best[torch.bfloat16]
    if ratio < 1.5:
        return torch.float32, f"bfloat16 is only {ratio:.2f} times as fast on this CPU"
    return torch.bfloat16, f"on this CPU {ratio:.1f} times as fast as float32 in a matrix product"


def seconds_of(work) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def start_run(settings, started: float) -> Run:
    """Choose device and precision; join the other processes if torchrun started this one."""
    device = choose_device(settings.device)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sharded = getattr(settings, "shard", False)
    if world > 1 or sharded:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        store = dist.HashStore() if world == 1 else None
        if world > 1 and os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps its store: after a restart the addresses of lost processes are there
            store, _, _ = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        ranks = dict(store=store, rank=rank, world_size=world) if store is not None else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **ranks)
    dtype, reason = choose_dtype(device, settings.dtype)
    if sharded and dtype == torch.float16:
        raise ValueError("--shard needs bfloat16 or float32: float16 scales the loss, which FSDP's "
                         "shards do not support")
    run = Run(device, dtype, rank, world, started=started, sharded=sharded)
    run.say(f"device     {device}: " + ("asked for" if settings.device else "the best there is")
            + (f"; {torch.get_num_threads()} threads" if device.type == "cpu" else "")
            + (f"; {world} processes" if world > 1 else ""))
    run.say(f"precision  {str(dtype).removeprefix('torch.')}: {reason}")
    settings.device, settings.dtype = device.type, str(dtype).removeprefix("torch.")
    return run


class Pace:
    """How far the run is, by its steps or, with --minutes, by the clock since the command."""

    def __init__(self, settings, run: Run, step: int):
        self.run, self.first = run, step
        self.steps = settings.steps or step + 1000      # with --minutes an estimate, renewed often
        minutes = getattr(settings, "minutes", None)    # finetune.py has none
        self.seconds = 60 * minutes if minutes else None
        self.takes = {}                                 # seconds of what comes after the last step
        self.skipped = 0                                # steps in a row that changed nothing
        self.begun = self.saved = time.time()
        self.left, self.save_every = 0.0, 60 * settings.save_minutes
        self.before = self.done = self.part(step)       # parts of the run, 0 to 1

    def part(self, step: int) -> float:
        """Which part of the run lies behind after so many steps."""
        if not self.seconds:
            return min(1.0, step / self.steps)
        passed = time.time() - self.run.started
        part = min(1.0, passed / max(1e-9, self.seconds - self.closing))
        return self.run.sum(part)[0] / self.run.world   # the same on all processes

    def after(self, step: int) -> None:
        """Look at the clock after a step."""
        each = (time.time() - self.begun) / (step - self.first)
        self.before, self.done = self.done, self.part(step)
        if self.seconds:
            self.left = max(0.0, self.run.started + self.seconds - self.closing - time.time())
            self.steps = step + int(self.run.sum(self.left / each)[0] / self.run.world)
            self.done = 1.0 if self.steps == step else self.done
        else:
            self.left = each * (self.steps - step)

    def report(self, step: int, loss: float, lr: float, norm: float, speed: float,
               unit: str = "tokens", **drawn) -> None:
        """Say and log how a step went; count it if it was skipped. drawn: measures of GRPO."""
        run, finite = self.run, math.isfinite(loss) and math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        if not finite:
            run.say(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}: skipped")
        earned = f"  reward {drawn['reward']:.3f}" if drawn else ""
        run.say_step(f"step {step}/{self.steps}  loss {loss:.4f}{earned}  lr {lr:.2e}  norm "
                     f"{norm:.2f}  {speed:,.0f} {unit}/s  {clock(self.left)} left", step,
                     self.steps)
        run.log(step=step, loss=loss, lr=lr, norm=norm,
                skipped=self.skipped, seconds=time.time() - run.started,
                peak_bytes=peak_bytes(run.device),
                **{f"{unit}_per_s": speed},
                **{f"drawn_{name}": value for name, value in drawn.items()})

    @property
    def closing(self) -> float:
        """How long the end of the run will take, in seconds; what was not done yet is guessed."""
        guess = 0.02 * (self.seconds or 0.0)
        return 1.0 + sum(self.takes.get(what, guess) for what in ("validation", "sample", "saving"))

    @contextlib.contextmanager
    def closing_takes(self, what: str, times: float = 1.0):
        """Learn it by doing it now."""
        begun = time.time()
        yield
        self.takes[what] = times * (time.time() - begun)

    def due(self, every: int | None, parts: int, step: int) -> bool:
        """Whether it is time: each `every` steps, or `parts` times in a run, and at its end."""
        due = step % every == 0 if every else int(self.done * parts) > int(self.before * parts)
        return due or self.done >= 1

    def stop_if_no_better(self, step: int, best: dict) -> None:
        """End the run if no validation has been better than best's for a third of it."""
        if self.done - best["done"] > 1 / 3:
            self.run.say(f"stopped    at step {step}: no validation has been better than that of "
                         f"step {best['step']} for a third of the run")
            self.done = 1.0

    def save_is_due(self) -> bool:
        """Whether rank 0 has not saved for --save-minutes."""
        overdue = self.run.rank == 0 and time.time() - self.saved >= self.save_every
        if not self.run.sum(float(overdue))[0]:
            return False
        self.saved = time.time()
        return True


class Interrupt:
    """Ctrl-C and SIGTERM as a flag that the loop looks at between two steps."""

    def __enter__(self):
        self.signal, self.before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):                       # not the main thread
                self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.signal = number
        signal.signal(number, self.before[number])                      # a second one ends at once

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def seen(self, run: Run) -> int:
        """The signal that any process was sent, or 0."""
        return int(max(run.sum(self.signal)))


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
