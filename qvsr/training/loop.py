"""One training loop for all stages: seeded steps, moving average, resumable checkpoints in safetensors, a CSV curve."""

from __future__ import annotations

import csv
import hashlib
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qvsr.config import TrainingStage
from qvsr.progress import progress
from qvsr.provenance import atomic_path

Draw = Callable[[torch.Generator], tuple[Tensor, ...]]
"""What one step learns from: tensors of the same shapes at every step, drawn from a generator."""

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""From what was drawn to a scalar, and what is logged beside it."""


class OutOfTime(Exception):
    """The time given is over; the checkpoint holds the state and the same call goes on."""


class Average:
    """Exponential moving average of parameters, warmed up so that the first steps do not weigh for ever."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone().float() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        current = [p for p in module.parameters() if p.requires_grad]
        torch._foreach_lerp_([self.values[name] for name in names], current, 1 - decay)


class Objective(nn.Module):
    """A loss as a module of all that it trains, which is what CUDA can record and replay."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, *batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(*batch)


def fit(
    module: nn.Module,
    draw: Draw,
    loss: Loss,
    stage: TrainingStage,
    name: str,
    folder: Path,
    seed: int,
    deadline: float | None = None,
) -> None:
    """Train the parameters of `module` that require gradients, and leave their moving average in it.

    Step k draws everything from a generator seeded by (seed, name, k), so a run that was interrupted goes on as if it had not
    been. The curve is written to ``{folder}/{name}.csv``.

    Args:
        module: holds the parameters; modified in place.
        draw: makes what one step learns from.
        loss: maps that to a scalar and to what is logged beside it.
        folder: holds ``{name}.state.safetensors`` while training and after it.
        deadline: monotonic time at which to save and raise.
    Raises:
        OutOfTime: the deadline came first.
        ValueError: the loss is not finite.
    """
    device = next(module.parameters()).device
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    objective: nn.Module = Objective(module, loss)
    average = Average(module, stage.ema)
    folder.mkdir(parents=True, exist_ok=True)
    state_file = folder / f"{name}.state.safetensors"
    step = _restore(state_file, trained, optimizer, average) if state_file.is_file() else 0
    curve = folder / f"{name}.csv"
    _cut(curve, step)
    generator = torch.Generator(device=device)
    started, first = time.monotonic(), step
    with progress(name, parts=0) as report:  # a bar on a terminal; elsewhere the lines below are enough
        while step < stage.steps:
            rate = learning_rate(step, stage)
            generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}/{step}".encode()).digest()[:7], "little"))
            batch = draw(generator)
            if step == first and device.type == "cuda":
                # Thousands of small kernels a step take longer to launch than to run: a GPU records them once and replays them.
                objective = torch.cuda.make_graphed_callables(objective, batch, allow_unused_input=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value, facts = objective(*batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            average.update(module, step)
            step += 1
            report(step, stage.steps)
            if step % stage.log_every == 0 or step == stage.steps:
                row = {"loss": value.item()} | {key: fact.item() for key, fact in facts.items()}
                if not math.isfinite(row["loss"]):
                    raise ValueError(f"{name}: the loss is {row['loss']} at step {step}; lower training.{name}.learning_rate")
                _log(curve, {"step": step, "learning_rate": rate, **row})
                seconds = (time.monotonic() - started) / (step - first)
                print(
                    f"{name} {step}/{stage.steps} " + " ".join(f"{key} {fact:.4g}" for key, fact in row.items()) + f" {seconds:.3f} s/step",
                    flush=True,
                )
            late = deadline is not None and time.monotonic() > deadline
            if late or step % stage.save_every == 0 or step == stage.steps:
                _save(state_file, step, trained, optimizer, average)
            if late and step < stage.steps:
                raise OutOfTime(f"{name}: stopped at step {step} of {stage.steps}; the same command goes on")
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(average.values[key])


def learning_rate(step: int, stage: TrainingStage) -> float:
    """Linear warm-up over the first 2 %, then cosine to a hundredth."""
    warm = max(1, stage.steps // 50)
    if step < warm:
        return stage.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, stage.steps - warm)
    return stage.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _save(file: Path, step: int, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: Average) -> None:
    tensors = {}
    for key, parameter in trained.items():
        state = optimizer.state[parameter]
        tensors |= {
            f"p.{key}": parameter.detach(),
            f"a.{key}": average.values[key],
            f"m.{key}": state["exp_avg"],
            f"v.{key}": state["exp_avg_sq"],
        }
    with atomic_path(file) as temporary:
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary, {"step": str(step)})


@torch.no_grad()
def _restore(file: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, average: Average) -> int:
    with safe_open(file, "pt") as opened:
        step = int(opened.metadata()["step"])
    tensors = load_file(file)
    for key, parameter in trained.items():
        if f"p.{key}" not in tensors or tensors[f"p.{key}"].shape != parameter.shape:
            raise ValueError(f"{file} is of another configuration: {key} is missing or has another shape; delete it to train anew")
        parameter.copy_(tensors[f"p.{key}"])
        average.values[key].copy_(tensors[f"a.{key}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step), device=parameter.device),  # the fused optimizer counts on the GPU
            "exp_avg": tensors[f"m.{key}"].to(parameter),
            "exp_avg_sq": tensors[f"v.{key}"].to(parameter),
        }
    return step


def _log(file: Path, row: dict[str, float]) -> None:
    new = not file.is_file()
    with file.open("a", newline="") as opened:
        writer = csv.writer(opened)
        if new:
            writer.writerow(row)
        writer.writerow([value if isinstance(value, int) else f"{value:.6g}" for value in row.values()])


def _cut(file: Path, step: int) -> None:
    """Drop the rows of steps that a resumed run takes again."""
    if file.is_file():
        head, *rows = file.read_text().splitlines(keepends=True)
        file.write_text("".join([head, *(row for row in rows if int(row.split(",")[0]) <= step)]))
