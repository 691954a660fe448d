"""The rounds of a peer in ``sinktrain bench train``: it trains what ours trains, in the usual loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sinktrain.data.datamodule import WindowData
from sinktrain.errors import SinktrainError
from sinktrain.experiments.time_by_part import time_by_part
from sinktrain.experiments.training_contenders import (
    COMPARED_LOSSES,
    NUM_BATCHES,
    PROFILED_STEPS,
    Clock,
    Contender,
    OurTraining,
    Record,
    Workload,
    round_bar,
)
from sinktrain.experiments.training_peers import TrainingPeer
from sinktrain.model.config import ModelConfig
from sinktrain.model.init import initialize
from sinktrain.model.neox import GPTNeoX

LOSS_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
"""Nats by which the losses of the first two steps may differ from ours."""


class PeerTraining(Contender):
    """A peer's rounds.

    Args:
        ours: has run its first round, with whose weights, batches and recipe the peer begins.
    """

    def __init__(self, work: Workload, peer_type: type[TrainingPeer], ours: OurTraining) -> None:
        self.work = work
        self.peer_type = peer_type
        self.ours = ours
        self.record = Record(peer_type.name, peer_type.note)
        self.records = [self.record]
        self._loop: PeerLoop | None = None

    def run(self, number: int) -> None:
        """
        Raises:
            SinktrainError: the peer is not installed, or its first losses are not ours.
        """
        work, record = self.work, self.record
        with round_bar(work, record.name, number, work.warm_up + work.num_steps) as bar:
            clock = Clock(work.device)
            if self._loop is None:
                self._loop = PeerLoop(work, self.peer_type, self.ours)
            else:
                self._loop.move(work.device)
            clock.start()
            if record.warm_up_s is None:
                record.first_losses = self._loop.first_losses(bar.update)
                self._loop.take_steps(work.warm_up - COMPARED_LOSSES, bar.update)
                record.warm_up_s = clock.stop()
                self._check_losses()
            else:
                self._loop.take_steps(work.warm_up, bar.update)
            clock.start()
            self._loop.take_steps(work.num_steps, bar.update)
            record.step_s.append(clock.stop() / work.num_steps)
            clock.note_peak(record)
            if number == work.num_rounds - 1:
                num_steps = PROFILED_STEPS[work.device.type]
                record.parts = time_by_part(self._loop.take_steps, num_steps, work.device)
            self._loop.move(torch.device("cpu"))

    def release(self) -> None:
        self._loop = None

    def _check_losses(self) -> None:
        expected, found = self.ours.trained.first_losses, self.record.first_losses
        differences = [abs(a - b) for a, b in zip(expected, found, strict=False)]
        if len(differences) < COMPARED_LOSSES:
            raise SinktrainError("not timed: ours, whose first losses its own must equal, has not run")
        if not max(differences) <= LOSS_TOLERANCE[self.work.dtype]:
            raise SinktrainError(
                f"not timed, because it does not train the same: its first losses are {_told(found)}, "
                f"ours {_told(expected)}"
            )


class PeerLoop:
    """The usual step around a peer: micro-batches, clipping, fused AdamW, and no waiting for the device."""

    def __init__(self, work: Workload, peer_type: type[TrainingPeer], ours: OurTraining) -> None:
        recipe = ours.cli.model
        self.work = work
        self.clip_norm = recipe.clip_norm
        self.peer = peer_type(ours.config, initial_weights(ours.config, recipe.seed), work.device)
        self.optimizer = torch.optim.AdamW(
            self.peer.network.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
        )
        self.batches = [batch.to(work.device) for batch in first_batches(work, recipe.seed)]
        self._steps_taken = 0

    def first_losses(self, after_each: Callable[[], object]) -> list[float]:
        """Take the first steps; their losses, in nats."""
        losses = []
        for _ in range(COMPARED_LOSSES):
            losses.append(float(self.step()))
            after_each()
        return losses

    def take_steps(self, num_steps: int, after_each: Callable[[], object] = lambda: None) -> None:
        for _ in range(num_steps):
            self.step()
            after_each()

    def step(self) -> Tensor:
        """One step on the next batch; its mean loss, float[], before the weights change."""
        micro_batches = torch.split(self.batches[self._steps_taken % NUM_BATCHES], self.work.micro_batch)
        self._steps_taken += 1
        kind, is_mixed = self.work.device.type, self.work.dtype == torch.bfloat16
        losses = []
        for windows in micro_batches:
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=is_mixed):
                loss = self.peer.loss(windows[:, :-1], windows[:, 1:]) / len(micro_batches)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.peer.network.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).sum()

    def move(self, device: torch.device) -> None:
        """Take weights and optimizer state along."""
        self.peer.network.to(device)
        for state in self.optimizer.state.values():
            state.update({key: value.to(device) for key, value in state.items()})


def initial_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """What our training starts from."""
    network = GPTNeoX(config)
    initialize(network, seed)
    return network.state_dict()


def first_batches(work: Workload, seed: int) -> list[Tensor]:
    """The global batches that training begins with: int64[global_batch, seq + 1] each."""
    data = WindowData(str(work.folder), work.seq_len, work.global_batch, work.micro_batch, seed=seed)
    loader = data.train_dataloader()
    return [loader.batch(number) for number in range(NUM_BATCHES)]


def _told(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.4f}" for value in values)
