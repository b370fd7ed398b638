import pytest

from qvsr.registry import Registry, UnknownNameError


def test_unknown_name_is_answered_with_what_would_work():
    metrics = Registry("metric")
    metrics.add("psnr")(lambda: 1)
    metrics.add("ssim")(lambda: 2)
    with pytest.raises(UnknownNameError, match="no metric 'psrn'; did you mean psnr. known: psnr, ssim"):
        metrics["psrn"]


def test_a_name_is_taken_once():
    methods = Registry("method")
    methods.add("maxmin")(lambda: 1)
    with pytest.raises(ValueError, match="method 'maxmin' is registered twice"):
        methods.add("maxmin")(lambda: 2)


def test_facts_are_kept_beside_the_function():
    metrics = Registry("metric")
    metrics.add("psnr", unit="dB")(lambda x: x + 1)
    assert metrics["psnr"].facts == {"unit": "dB"}
    assert metrics["psnr"](1) == 2
    assert list(metrics) == ["psnr"]
    assert "psnr" in metrics
