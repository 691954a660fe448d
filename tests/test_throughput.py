"""FLOPs of a token, and peaks of devices, against published numbers."""

from __future__ import annotations

import pytest
import torch

from sinktrain.model.config import PYTHIA
from sinktrain.training.throughput import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("name", "full", "causal"),
    [
        ("pythia-14m", 0.065, 0.055),
        ("pythia-31m", 0.143, 0.124),
        ("pythia-70m", 0.343, 0.306),
        ("pythia-160m", 0.968, 0.855),
        ("pythia-410m", 2.725, 2.423),
        ("pythia-1b", 6.255, 5.853),
        ("pythia-1.4b", 9.074, 8.470),
    ],
)
def test_gigaflops_of_a_token_of_pythia(name: str, full: float, causal: float) -> None:
    config = PYTHIA[name]
    assert flops_per_token(config, 50304, 2048) / 1e9 == pytest.approx(full, abs=6e-4)
    assert flops_per_token(config, 50304, 2048, is_causal=True) / 1e9 == pytest.approx(causal, abs=6e-4)


@pytest.mark.parametrize(
    ("device_name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),  # dense: Lightning's table has the sparse peak
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA RTX A6000", 154.8),  # the paper's GPU: Lightning's table has the float32 peak
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_peaks_are_dense(device_name: str, teraflops: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    assert peak_flops(torch.device("cuda")) == teraflops * 1e12


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA GeForce GTX 1080",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100X",
    ],
)
def test_no_peak_is_made_up_for_an_unknown_device(device_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: device_name)
    assert peak_flops(torch.device("cuda")) is None


def test_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
