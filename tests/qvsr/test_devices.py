import subprocess
import sys

import pytest
import torch

from qvsr import devices
from qvsr.provenance import ROOT


def test_the_cpu_is_held_by_nobody():
    assert devices.pick("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        devices.DeviceError, match=r"device is cuda, but torch finds no GPU on \S+: set device to cpu, or run the job where"
    ):
        devices.pick("cuda")


def test_jobs_side_by_side_take_different_gpus_and_wait_for_a_third(tmp_path):
    """Each process holds its GPU until it ends; the one that finds none free goes on when the first has ended."""
    code = (
        "import sys; from pathlib import Path; from qvsr import devices; devices.WAIT_SECONDS = 0.05\n"
        "print(devices.claim(['GPU-a', 'GPU-b'], Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    running = [start()]
    try:
        assert running[0].stdout.readline() == "0\n"
        running.append(start())
        assert running[1].stdout.readline() == "1\n"
        running.append(start())
        with pytest.raises(subprocess.TimeoutExpired):
            running[2].wait(1)
        running[0].kill()  # however it ends
        assert running[2].stdout.readline() == "0\n"
    finally:
        for one in running:
            one.kill()
            one.communicate()
