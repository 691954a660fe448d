"""Habits of every test."""

import os

# As the command line does, and before torch is imported: see sinktrain.cli.share_cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch

torch.set_num_threads(1)  # the models are tiny, and other processes may share the cores
