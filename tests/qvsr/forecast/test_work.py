import pytest

from qvsr.forecast import work
from qvsr.plan import resolve
from qvsr.provenance import ROOT

PAPER = ROOT / "config" / "paper.yaml"


def test_the_full_size_networks_take_what_the_reference_code_takes():
    """Parameters, and 1e9 multiply-accumulates of layers and of attention, counted of the reference's own modules on the meta device."""
    nets = work.networks(resolve([PAPER], {}))
    assert (nets.unet.params, nets.structure.params, nets.encode.params) == (935_321_287, 52_494_080, 114_973_812)
    for network, gmacs, attention in (
        (nets.unet, 1879.668, 315.135),
        (nets.structure, 131.582, 91.960),
        (nets.encode, 2705.747, 2791.646 - 2705.747),
        (nets.decode, 10261.491, 10347.390 - 10261.491),
    ):
        assert (round(network.gmacs, 3), round(network.attention, 3)) == (gmacs, pytest.approx(attention, abs=1e-3))  # 3 digits are given
    assert nets.encoders == 2


def test_what_each_method_does_by_its_settings():
    config = resolve([PAPER], {})
    method = config.method
    assert work.method_calls("quantvsr", method.quantvsr, 1800) == (1800, 3 * 4 * 1800)
    off = method.quantvsr.model_copy(update={"lba": False, "stca": False})
    assert work.method_calls("quantvsr", off, 1800) == (0, 3 * 4 * 900)
    assert work.method_calls("maxmin", method.maxmin, 1800) == (0, 0)
    assert work.method_calls("efficientdm", method.efficientdm, 1800) == (16, 3 * 16000)
    assert work.method_calls("passionsr", method.passionsr, 1800) == (3600, 3 * 1800 * 4)
    assert work.method_calls("svdquant", method.svdquant, 1800) == (128, 128 * 44)
    assert work.method_calls("somebody_s", None, 1800) is None


def test_attention_grows_with_the_square_of_the_area():
    assert work.Network(100, 10, params=1).at(0.5) == 50 + 2.5


def test_converting_takes_as_long_as_it_took():
    """Measured on one core: 1.39 s for the digests and 4.54 s for the rest of 1.79 GB that lay in memory; more where a disk is read."""
    assert 5.9 < work.convert_hours([1_440_000_000, 351_383_085]) * 3600 < 2 * 5.9
