"""The full-precision row is the network itself."""

import tiny
import torch

import baselines.full_precision
from qvsr.registry import BASELINES


def test_nothing_changes():
    net = tiny.network()
    call = tiny.calls(net, 1)[0]
    assert BASELINES["full_precision"](net, None, None) is net
    assert BASELINES["full_precision"].function is baselines.full_precision.full_precision
    assert torch.equal(tiny.run(net, call), call.out)
