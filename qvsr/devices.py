"""Which device a job's networks run on: the CPU, or a GPU that no other job of this user holds.

A cluster shows a job its own GPU alone. On one machine with several, jobs that run side by side (`--resources gpu=8`) share them out themselves:
each holds a file named by the GPU's identifier as long as it lives, and takes a GPU whose file nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from qvsr.models.checkpoints import Backbone

WAIT_SECONDS = 2.0
_held: list[int] = []  # open files; the system lets go of them when the process ends, however it ends


class DeviceError(ValueError):
    """A device that is asked for and not here."""


def pick(name: str) -> torch.device:
    """The device that the setting `device` stands for; a GPU is held until the process ends.

    Raises:
        DeviceError: a GPU is asked for and torch finds none.
    """
    import torch

    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device is {name}, but torch finds no GPU on {socket.gethostname()}: set device to cpu, or run the job where there is one"
        )
    identifiers = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return torch.device(name, claim(identifiers, Path(tempfile.gettempdir())))


def claim(identifiers: Sequence[str], folder: Path) -> int:
    """Index of a GPU that no other process of this user holds; waits until there is one.

    Args:
        identifiers: of the GPUs, the same in every process.
        folder: where the files that stand for them lie.
    """
    while True:
        for index, identifier in enumerate(identifiers):
            opened = os.open(folder / f"qvsr-{os.getuid()}-{identifier}.gpu", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(opened)
                continue
            _held.append(opened)
            return index
        time.sleep(WAIT_SECONDS)


def moved(backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone with its networks and its context on a device."""
    for network in (backbone.unet, backbone.structure, backbone.first_stage, backbone.vae):
        network.to(device)
    return replace(backbone, context=backbone.context.to(device))
