"""Rotary angles against decimal arithmetic, and the rotation against complex numbers."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from oracles import tiny_model

from sinktrain.model.rotary import angle_dtype, apply_rotary, phase_steps, rotary_angles

BASE = 10000.0
FAR = [0, 1, 2047, 2**24 + 1, 2**40, 2**40 + 12345, 2**53 + 1, 2**62 + 7]


def machin_pi() -> Decimal:
    """Pi to the precision of the context: 16 atan(1/5) - 4 atan(1/239)."""

    def atan_inverse(n: int) -> Decimal:
        terms = (Decimal((-1) ** i) / ((2 * i + 1) * Decimal(n) ** (2 * i + 1)) for i in range(80))
        return sum(terms, Decimal(0))

    return 16 * atan_inverse(5) - 4 * atan_inverse(239)


def exact_angles(position: int, rotary_ndims: int) -> list[float]:
    """position * base^(-2i/n), modulo a turn, from 100 decimals."""
    with localcontext(prec=100):
        turn = 2 * machin_pi()
        frequencies = [(Decimal(BASE).ln() * -2 * i / rotary_ndims).exp() for i in range(rotary_ndims // 2)]
        return [float((position * frequency) % turn) for frequency in frequencies]


@pytest.mark.parametrize("rotary_ndims", [2, 8, 16, 256])
@pytest.mark.parametrize("position", FAR)
def test_angle_is_off_by_half_a_step_for_each_position_at_most(position, rotary_ndims):
    steps = phase_steps(rotary_ndims, BASE)
    cos, sin = rotary_angles(torch.tensor([position]), steps, torch.float64)
    exact = torch.tensor(exact_angles(position, rotary_ndims), dtype=torch.float64)
    bound = position * 2**-65 * math.tau + 1e-15
    half = rotary_ndims // 2
    assert (cos[0, :half] - exact.cos()).abs().max() <= bound
    assert (sin[0, :half] - exact.sin()).abs().max() <= bound
    assert torch.equal(cos[:, :half], cos[:, half:])
    assert torch.equal(sin[:, :half], sin[:, half:])


def test_angle_error_at_2_to_the_40_is_2e_7_where_float64_products_are_off_by_more():
    position, rotary_ndims = 2**40, 16
    cos, _ = rotary_angles(torch.tensor([position]), phase_steps(rotary_ndims, BASE), torch.float64)
    exact = torch.tensor(exact_angles(position, rotary_ndims), dtype=torch.float64).cos()
    frequencies = BASE ** (-2 * torch.arange(rotary_ndims // 2, dtype=torch.float64) / rotary_ndims)
    assert (cos[0, : rotary_ndims // 2] - exact).abs().max() < 2e-7
    assert ((position * frequencies).cos() - exact).abs().max() > 1e-6


def test_phases_wrap_as_python_integers_modulo_2_to_the_64():
    steps = phase_steps(16, BASE)
    for position in FAR:
        phases = torch.tensor([position]).unsqueeze(-1) * steps
        expected = [(position * step) % 2**64 for step in steps.tolist()]
        assert [phase % 2**64 for phase in phases[0].tolist()] == expected


@pytest.mark.parametrize("start", [2**24, 2**40, 2**62])
def test_score_depends_on_the_distance_alone_however_far_the_stream_is(start):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    steps = phase_steps(32, BASE)

    def score(query_pos: int, key_pos: int) -> float:
        at = [rotary_angles(torch.tensor([pos]), steps, torch.float64) for pos in (query_pos, key_pos)]
        return float((apply_rotary(q, *at[0]) * apply_rotary(k, *at[1])).sum())

    for distance in (0, 1, 1000):
        assert score(start + distance, start) == pytest.approx(score(distance, 0), abs=1e-13)


def test_float64_models_take_angles_in_float64_and_all_others_in_float32():
    assert angle_dtype(torch.float64) == torch.float64
    assert {angle_dtype(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
    wide, _ = rotary_angles(torch.arange(2000), phase_steps(16, BASE), torch.float64)
    narrow, _ = rotary_angles(torch.arange(2000), phase_steps(16, BASE), torch.float32)
    assert torch.equal(narrow, wide.float())
    assert not torch.equal(narrow.double(), wide)


def test_rotation_is_a_complex_product_in_halves_layout_and_the_rest_passes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 10, generator=generator, dtype=torch.float64)
    cos, sin = rotary_angles(torch.arange(5), phase_steps(4, BASE), torch.float64)
    turned = torch.complex(x[..., :2], x[..., 2:4]) * torch.complex(cos[:, :2], sin[:, :2])
    expected = torch.cat((turned.real, turned.imag, x[..., 4:]), dim=-1)
    torch.testing.assert_close(apply_rotary(x, cos, sin), expected, rtol=0, atol=1e-15)


def test_no_rotary_dimensions_change_nothing():
    x = torch.randn(2, 3, 5, 10, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_angles(torch.arange(5), phase_steps(0, BASE), torch.float32)
    assert cos.shape == (5, 0)
    assert torch.equal(apply_rotary(x, cos, sin), x)


def test_bfloat16_is_rotated_in_float32_and_comes_back_as_bfloat16():
    x = torch.randn(1, 1, 50, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotary_angles(torch.arange(50), phase_steps(8, BASE), torch.float32)
    rotated = apply_rotary(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rotary(x.float(), cos, sin).bfloat16())


def test_steps_follow_the_model_but_are_no_part_of_its_state():
    model = tiny_model(dtype=torch.float32)
    steps = phase_steps(model.config.network.rotary_ndims, BASE)
    assert torch.equal(model.to(torch.float64).rotary_steps, steps)
    assert "rotary_steps" not in model.state_dict()
    assert model.to("meta").rotary_steps.device.type == "meta"
