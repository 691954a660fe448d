"""Speed of training: tokens per second, and the share of the device's peak that they use (MFU)."""

from __future__ import annotations

import re

import torch

from sinktrain.model.config import NetworkConfig

PEAK_BF16_FLOPS = {
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 6000 Ada": 364e12,
    "RTX A6000": 154.8e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense bf16 peaks in FLOP/s, without sparsity, from the vendors' data sheets; the first name found in
the device's name counts. Lightning 2.6.6's own table is wrong for several of them (H200, H100 NVL, A6000)."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device, or None where it is unknown: then no MFU is reported."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if re.search(r"Laptop|Max-Q|MIG|RTX 4090 D", name):  # slower than their names begin
        return None
    return next((peak for known, peak in PEAK_BF16_FLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def flops_per_token(config: NetworkConfig, vocab_size: int, seq_len: int, is_causal: bool = False) -> float:
    """Forward and backward FLOPs of one token: 6 for each weight of a matrix product, and attention.

    Args:
        is_causal: count only the half of the attention matrix that a causal model needs; otherwise
            all of it (the convention of PaLM, appendix B).
    """
    assert config.intermediate_size is not None
    hidden, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * hidden**2 + 2 * hidden * config.intermediate_size) + vocab_size * hidden
    attention = 12 * layers * hidden * seq_len
    return 6 * weights + (attention / 2 if is_causal else attention)
