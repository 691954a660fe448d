"""Muon is torch's, several matrices at a time; it clips, skips, saves and resumes as AdamW does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fit import assert_bitwise_equal, assert_same_state, checkpoint, measured
from tiny_models import tiny_model
from tiny_shards import tiny_run

from sinktrain.cli import main
from sinktrain.model.neox import GPTNeoX
from sinktrain.training.module import Pretraining
from sinktrain.training.muon import Muon, muon, muon_groups, orthogonalized

LR, DECAY, BETAS, EPS = 0.02, 0.1, (0.9, 0.95), 1e-8


def trained_model(dtype: torch.dtype = torch.float32, **changes: Any) -> GPTNeoX:
    """Two layers, embedding and head, whose parameters take gradients."""
    return tiny_model(**changes).to(dtype).requires_grad_(True)


def draw_gradients(model: GPTNeoX, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


def split(fused: torch.Tensor, num_heads: int) -> list[torch.Tensor]:
    """Query, key and value of a fused matrix, row by row: [head, 3 * head_dim] as the network reads them."""
    head_dim = len(fused) // (3 * num_heads)
    kinds: list[list[torch.Tensor]] = [[], [], []]
    for row, values in enumerate(fused):
        kinds[row // head_dim % 3].append(values)
    return [torch.stack(rows) for rows in kinds]


def torchs_own(model: GPTNeoX, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights after so many steps of torch.optim's Muon, in float64 throughout, and AdamW."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    heads = model.config.network.num_attention_heads
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    fused = {name: split(w, heads) for name, w in weights.items() if name.endswith("query_key_value.weight")}
    parts = {(name, kind): w for name, three in fused.items() for kind, w in enumerate(three)}
    plain = {
        name: w for name, w in weights.items() if ".layers." in name and w.dim() == 2 and name not in fused
    }
    rest = {name: w for name, w in weights.items() if name not in plain and name not in fused}
    for w in (*parts.values(), *plain.values(), *rest.values()):
        w.requires_grad_(True)
    theirs = torch.optim.Muon(
        [*parts.values(), *plain.values()], LR, DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": [w for w in rest.values() if w.dim() == 2], "weight_decay": DECAY},
        {"params": [w for w in rest.values() if w.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, LR, BETAS, EPS)
    for step in range(num_steps):
        draw_gradients(model, step)
        for name, p in model.named_parameters():
            assert p.grad is not None
            if name in fused:
                for kind, gradient in enumerate(split(p.grad, heads)):
                    parts[name, kind].grad = gradient
            else:
                (plain | rest)[name].grad = p.grad
        theirs.step()
        adamw.step()
    ended = {name: torch.cat([parts[name, kind] for kind in range(3)]) for name in fused}
    return {name: w.detach() for name, w in (plain | rest | ended).items()}


def test_equals_torchs_muon_and_adamw_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64. Queries, keys and values are three matrices to torch, and rows of one to us."""
    for num_steps in (1, 2, 5):
        model = trained_model(torch.float64)
        expected = torchs_own(model, num_steps, monkeypatch)
        ours = Muon(muon_groups(model, DECAY), LR, BETAS, EPS, dtype=torch.float64)
        for step in range(num_steps):
            draw_gradients(model, step)
            ours.step()
        for name, p in model.named_parameters():
            found = p.detach()
            if name.endswith("query_key_value.weight"):
                found = torch.cat(split(found, model.config.network.num_attention_heads))
            difference = (found - expected[name]).abs().max()
            assert difference < 1e-12, f"{name} after {num_steps} steps: {difference:.1e}"


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (2, 32, 32)])
def test_singular_values_end_near_1_in_the_directions_of_the_matrix(shape: tuple[int, ...]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    for matrix, found in zip(stack, orthogonalized(stack, torch.bfloat16).float(), strict=True):
        u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
        turned = u.T @ found @ v.T
        assert turned.diag()[sizes > sizes[0] / 20].sub(1).abs().max() < 0.4
        assert (turned - turned.diag().diag()).abs().max() < 0.05
    assert torch.equal(orthogonalized(torch.zeros(shape), torch.bfloat16).float(), torch.zeros(shape))


def test_every_parameter_is_in_one_group_and_the_layers_matrices_are_muons() -> None:
    model = trained_model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = muon_groups(model, DECAY)
    fused, matrices, decayed, spared = ([names[id(p)] for p in group["params"]] for group in groups)
    assert sorted(fused + matrices + decayed + spared) == sorted(names.values())
    assert fused == [f"gpt_neox.layers.{layer}.attention.query_key_value.weight" for layer in (0, 1)]
    assert len(matrices) == 2 * 3
    assert all("layers" in name and name.endswith("weight") and "norm" not in name for name in matrices)
    assert set(decayed) == {"gpt_neox.embed_in.weight", "embed_out.weight"}
    assert [group["weight_decay"] for group in groups] == [DECAY, DECAY, DECAY, 0.0]


def test_frozen_parameters_are_in_no_group() -> None:
    model = trained_model()
    frozen = [model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight, model.embed_out.weight]
    for p in frozen:
        p.requires_grad_(False)
    found = {id(p) for group in muon_groups(model, DECAY) for p in group["params"]}
    assert not found & {id(p) for p in frozen}


def stepped(
    scale: float | None = None, found_inf: float | None = None, poison: float | None = None
) -> tuple[GPTNeoX, Muon]:
    """A model after one step, and one more with these flags."""
    model = trained_model()
    optimizer = muon(model, LR, DECAY, BETAS, EPS)
    draw_gradients(model, 0)
    optimizer.step()
    draw_gradients(model, 1)
    for p in model.parameters():
        assert p.grad is not None
        if poison is not None:
            p.grad.view(-1)[0] = poison
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
    if scale is not None or found_inf is not None:
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("poison", [None, float("nan"), float("inf")])
def test_a_skipped_step_leaves_weights_and_state_as_they_are(poison: float | None) -> None:
    before, skipped = stepped(), stepped(2.0, 1.0, poison)
    assert_bitwise_equal(before[0].state_dict(), skipped[0].state_dict())
    assert_bitwise_equal(before[1].state_dict()["state"], skipped[1].state_dict()["state"])


def test_gradients_are_divided_by_the_scale() -> None:
    """The second step must feel it: a single one is as long whatever the gradient's length."""
    model, optimizer = stepped(2.0, 0.0)
    by_hand = trained_model()
    plain = muon(by_hand, LR, DECAY, BETAS, EPS)
    for step in (0, 1):
        draw_gradients(by_hand, step)
        for p in by_hand.parameters():
            assert p.grad is not None
            p.grad /= 1 + step
        plain.step()
    assert_bitwise_equal(by_hand.state_dict(), model.state_dict())
    assert_bitwise_equal(plain.state_dict()["state"], optimizer.state_dict()["state"])


def test_steps_are_as_large_as_adamws() -> None:
    """So that AdamW's learning rate carries over: a root mean square of 0.2, for each of q, k and v too."""
    model = trained_model(hidden_size=64, num_attention_heads=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw_gradients(model, 0)
    muon(model, 1.0, 0.0, BETAS, EPS).step()
    for name, p in model.gpt_neox.layers.named_parameters(prefix="gpt_neox.layers"):
        if p.dim() == 2:
            change = p.detach() - before[name]
            for part in split(change, 4) if "query_key_value" in name else [change]:
                assert float(part.square().mean().sqrt()) == pytest.approx(0.2, rel=0.15), name


@pytest.mark.gpu
def test_a_step_on_cuda_does_not_wait_for_the_device() -> None:
    model = trained_model().cuda()
    optimizer = muon(model, LR, DECAY, BETAS, EPS)
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.grad_scale = torch.ones((), device="cuda")
        optimizer.found_inf = torch.zeros((), device="cuda")
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_replayed_as_a_cuda_graph_is_the_same_step(train: Callable[..., Path]) -> None:
    cuda = ["--trainer.accelerator", "gpu", "--model.compile", "false", *MUON]
    plain = train("plain", *cuda, "--model.cuda_graph", "false")
    graphed = train("graphed", *cuda, "--model.cuda_graph", "true")
    assert measured(graphed, "train/loss") == pytest.approx(measured(plain, "train/loss"), rel=1e-4)


# -- through fit ----------------------------------------------------------------------------------

MUON = ["--model.optimizer", "muon"]


def test_losses_fall_and_the_schedule_moves_every_group(train: Callable[..., Path]) -> None:
    run = train("run", *MUON, "--trainer.max_steps", "32")
    loss, rates = measured(run, "train/loss"), measured(run, "lr")
    assert loss[1] > 5.5
    assert loss[32] < 3
    groups = checkpoint(run)["optimizer_states"][0]["param_groups"]
    assert [group["lr"] for group in groups] == [rates[32]] * 4
    assert rates[32] < rates[3] / 5


def test_a_run_of_muon_continues_bit_for_bit(train: Callable[..., Path]) -> None:
    constant = ["--model.schedule", "wsd", "--model.decay_steps", "0", "--data.micro_batch", "2"]
    whole = train("whole", *MUON, *constant)
    train("parts", *MUON, *constant, "--trainer.max_steps", "7")
    parts = train("parts", *MUON, *constant)
    assert_same_state(whole, parts)
    assert measured(whole, "train/loss") == measured(parts, "train/loss")
    kept = [set(state) for state in checkpoint(parts)["optimizer_states"][0]["state"].values()]
    assert kept.count({"momentum_buffer"}) == 2 * 4
    assert kept.count({"step", "exp_avg", "exp_avg_sq"}) == len(kept) - 2 * 4


def test_a_spike_is_skipped_under_muon(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pretraining.mean_loss

    def mean_loss(module: Pretraining, windows: torch.Tensor, rows: int) -> torch.Tensor:
        loss = real(module, windows, rows)
        return loss * float("nan") if module.trainer.global_step == 3 else loss

    at_3 = checkpoint(train("run", *MUON, "--trainer.max_steps", "3"))
    monkeypatch.setattr(Pretraining, "mean_loss", mean_loss)
    at_4 = checkpoint(train("run", *MUON, "--trainer.max_steps", "4"))
    assert_bitwise_equal(at_3["state_dict"], at_4["state_dict"])
    assert_bitwise_equal(at_3["optimizer_states"][0]["state"], at_4["optimizer_states"][0]["state"])


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["fit", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_a_run_keeps_its_optimizer(
    train: Callable[..., Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("run")
    told = refusal(tiny_run(shards, run, *MUON, "--trainer.max_steps", "14"), capsys)
    assert f"--run {run} was made with optimizer adamw, not muon; choose another --run" in told
    last = run / "checkpoints" / "last.ckpt"
    told = refusal(tiny_run(shards, tmp_path / "new", *MUON, "--resume", str(last)), capsys)
    assert "was made with optimizer adamw, not muon; to start anew from its weights, use" in told


def test_a_sharded_strategy_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sharded = ["--config", "fsdp", "--trainer.devices", "1"]
    told = refusal(tiny_run(shards, tmp_path / "run", *MUON, *sharded), capsys)
    assert (
        "model.optimizer muon needs whole matrices, which FSDP2Strategy shards; use --config ddp, or" in told
    )
    assert not (tmp_path / "run").exists()
