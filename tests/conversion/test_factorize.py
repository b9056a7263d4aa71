"""Factors of random layers against brute force: what is rebuilt, its error under a metric, and who shares widths how.

Small sizes in float64, so equalities hold to rounding. F = 2 frequencies, so that their order shows.
"""

import itertools

import pytest
import torch

from context_pythia.conversion.calibrate import WEIGHTINGS, LayerStatistics
from context_pythia.conversion.compress import allocate
from context_pythia.conversion.factorize import KeysAndValues, LayerFactorizer, symmetric_root
from context_pythia.model.attention import RotaryUp

HIDDEN, HEADS, ROTARY = 32, 4, 4
FREQUENCIES = ROTARY // 2
TOKENS = 400


def random_layer(rotary_dim=ROTARY, bias=True, seed=0) -> KeysAndValues:
    dice = torch.Generator().manual_seed(seed)
    weight = torch.randn(2 * HIDDEN, HIDDEN, dtype=torch.float64, generator=dice)
    offset = torch.randn(2 * HIDDEN, dtype=torch.float64, generator=dice)
    return KeysAndValues(weight, offset if bias else torch.zeros_like(offset), HEADS, rotary_dim)


def random_inputs(seed=1) -> torch.Tensor:
    """Inputs whose directions differ in variance by some orders of magnitude, and whose mean is not zero."""
    dice = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64, generator=dice))[0]
    scales = torch.logspace(0, -2, HIDDEN, dtype=torch.float64)
    noise = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=dice)
    return (noise * scales) @ basis + torch.randn(HIDDEN, dtype=torch.float64, generator=dice)


def random_metric(seed=2) -> torch.Tensor:
    """Any positive definite metric: neither diagonal nor one that RoPE leaves alone."""
    dice = torch.Generator().manual_seed(seed)
    root = torch.randn(2 * HIDDEN, 2 * HIDDEN, dtype=torch.float64, generator=dice)
    root *= torch.logspace(0, -2, 2 * HIDDEN, dtype=torch.float64)[torch.randperm(2 * HIDDEN, generator=dice)]
    return root @ root.T


def turning(layer: KeysAndValues, angles) -> torch.Tensor:
    """The matrix that turns a layer's keys by an angle for each frequency, `[2 D, 2 D]`, written as RoPE does it."""
    matrix = torch.eye(2 * HIDDEN, dtype=torch.float64)
    half = layer.rotary_dim // 2
    for head, (f, angle) in itertools.product(range(HEADS), enumerate(angles)):
        a = head * (HIDDEN // HEADS) + f
        rows, angle = [a, a + half], torch.as_tensor(angle, dtype=torch.float64)
        block = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
        matrix[torch.tensor(rows)[:, None], torch.tensor(rows)] = block
    return matrix


def averaged(layer: KeysAndValues, metric: torch.Tensor) -> torch.Tensor:
    """The metric of errors that are turned first, averaged over all angles; three of a circle average a square."""
    circle = [2 * torch.pi * step / 3 + 0.1 for step in range(3)]
    turns = [turning(layer, angles) for angles in itertools.product(circle, repeat=layer.rotary_dim // 2)]
    return torch.stack([turn.T @ metric @ turn for turn in turns]).mean(0)


def rebuild(layer: KeysAndValues, factors, inputs: torch.Tensor) -> torch.Tensor:
    """Keys and values from the context alone, `[N, D] -> [N, 2 D]`, as the attention does it."""
    context = inputs @ factors.context_weight.T + factors.context_bias
    up = RotaryUp(HEADS, factors.pairs).double()
    up.weight.data = factors.rotary_up
    rotary = 2 * sum(factors.pairs)
    turned = torch.einsum("nr,hdr->nhd", context[:, :rotary], up.maps().detach())
    rest = (context @ factors.key_up.T).unflatten(-1, (HEADS, -1))
    return torch.cat(
        [torch.cat([turned, rest], dim=-1).flatten(1), context @ factors.value_up.T + factors.value_bias], dim=1
    )


def differences(layer: KeysAndValues, factors, inputs: torch.Tensor) -> torch.Tensor:
    """Errors `[N, 2 D]`. A constant in the keys' content drops out of the softmax, so it is no error."""
    found = rebuild(layer, factors, inputs) - (inputs @ layer.weight.T + layer.bias)
    free = layer.content_rows[layer.content_rows < HIDDEN]
    found[:, free] -= found[:, free].mean(0)
    return found


def brute_force(layer, factors, inputs, metric) -> float:
    errors = differences(layer, factors, inputs)
    return float(torch.einsum("ni,ij,nj->n", errors, metric, errors).mean()) / 2


def moments(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.mean(0), torch.cov(inputs.T, correction=0)


@pytest.fixture
def layer():
    return random_layer()


@pytest.fixture
def inputs():
    return random_inputs()


@pytest.fixture
def metric():
    return random_metric()


@pytest.fixture
def factorizer(layer, inputs, metric):
    return LayerFactorizer(layer, *moments(inputs), metric)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rotary_dim", [4, HIDDEN // HEADS])
def test_factors_of_full_width_are_exact_with_text_and_without(rotary_dim, bias, inputs, metric):
    layer = random_layer(rotary_dim, bias)
    no_text = WEIGHTINGS["none"](LayerStatistics.zeros(HIDDEN))
    for weighting, most in ((no_text, 1e-10), ((*moments(inputs), metric), 1e-6)):
        factorizer = LayerFactorizer(layer, *weighting)
        factors = factorizer.factors([HEADS] * (rotary_dim // 2), HIDDEN - HEADS * rotary_dim)
        assert factors.context_weight.shape == (HIDDEN, HIDDEN) and factors.error == 0
        assert differences(layer, factors, inputs).abs().max() < most


@pytest.mark.parametrize("pairs", [[4, 4], [3, 1], [0, 1]])
def test_the_error_is_that_of_the_rebuilt_keys_and_values_averaged_over_the_angles(
    pairs, layer, inputs, metric, factorizer
):
    errors, turned = factorizer.errors(pairs), averaged(layer, metric)
    assert len(errors) == HIDDEN - 2 * sum(pairs) + 1
    assert (errors.diff() <= 0).all() and errors[0] > errors[-1]
    for latent in {0, 1, 5, HIDDEN // 2, len(errors) - 1} & set(range(len(errors))):
        factors = factorizer.factors(pairs, latent)
        expected = brute_force(layer, factors, inputs, turned)
        # The ridge that keeps whitenings finite is 1e-9 of what there is.
        assert factors.error == pytest.approx(expected, rel=1e-5, abs=1e-7 * float(errors[0]))
        assert float(errors[latent]) == pytest.approx(factors.error, rel=1e-6, abs=1e-9 * float(errors[0]))


def test_the_averaged_error_is_that_of_keys_turned_by_random_angles(layer, inputs, metric, factorizer):
    factors, dice = factorizer.factors([2, 3], 4), torch.Generator().manual_seed(0)
    angles = 2 * torch.pi * torch.rand(300, FREQUENCIES, dtype=torch.float64, generator=dice)
    drawn = torch.stack([turn.T @ metric @ turn for turn in (turning(layer, row) for row in angles)]).mean(0)
    assert factors.error == pytest.approx(brute_force(layer, factors, inputs, drawn), rel=0.1)
    assert factors.error != pytest.approx(brute_force(layer, factors, inputs, metric), rel=0.01)


def test_a_turned_pair_gives_turned_keys(layer, inputs, factorizer):
    """Turning commutes with the way back: what one caches turned needs no turning back to be attended to."""
    factors, angles = factorizer.factors([3, 2], 0), (0.7, -1.9)
    pairs = torch.view_as_complex(
        (inputs @ factors.context_weight.T + factors.context_bias)[:, :10].unflatten(-1, (2, 5)).mT.contiguous()
    )
    turned = pairs * torch.polar(torch.ones(2), torch.tensor(angles)).repeat_interleave(torch.tensor([3, 2]))
    keys = torch.view_as_real(torch.einsum("np,hp->nhp", turned, torch.view_as_complex(factors.rotary_up)))
    ours = torch.stack([keys[:, :, :3].sum(2), keys[:, :, 3:].sum(2)], dim=2)  # [N, H, F, 2]
    plain = rebuild(layer, factors, inputs) @ turning(layer, angles).T
    expected = plain[:, layer.rotary_rows.permute(1, 0, 2)]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_context_has_the_size_of_keys_whatever_that_of_the_gradients(scale, layer, inputs, metric):
    factors = LayerFactorizer(layer, *moments(inputs), scale * metric).factors([2, 3], 4)
    sizes = factors.context_weight[:10].norm(dim=1)
    own = layer.weight[layer.rotary_rows.flatten()].norm(dim=1)
    assert 0.3 * own.min() < sizes.min() and sizes.max() < 3 * own.max()
    assert factors.rotary_up.abs().max() < 100


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_no_other_latent_of_the_same_width_does_better(scale, layer, inputs, metric, factorizer):
    """Each rival gets the best way back there is: least squares, which no metric changes."""
    pairs, latent, dice = [2, 1], 6, torch.Generator().manual_seed(3)
    factors, rows = factorizer.factors(pairs, latent), layer.content_rows
    lost = float(factorizer.errors(pairs)[-1])  # of the rotary keys
    metric = metric[rows][:, rows]
    centered = inputs - inputs.mean(0)
    content = centered @ layer.weight[rows].T

    def least(context_weight):
        context = centered @ context_weight.T
        rest = content - context @ torch.linalg.lstsq(context, content).solution
        return float(torch.einsum("ni,ij,nj->n", rest, metric, rest).mean()) / 2 + lost

    ours = factors.context_weight
    assert least(ours) == pytest.approx(factors.error, rel=1e-5)
    for _ in range(5):
        rival = ours.clone()
        rival[6:] += (
            scale
            * ours[6:].norm(dim=1, keepdim=True)
            * torch.randn(latent, HIDDEN, dtype=torch.float64, generator=dice)
        )
        assert least(rival) > factors.error * (1 - 1e-6)


def test_no_other_pairs_of_the_same_number_keep_more_of_the_rotary_keys(layer, inputs, metric, factorizer):
    dice, turned = torch.Generator().manual_seed(4), averaged(layer, metric)
    keys = inputs @ layer.weight.T + layer.bias
    for f, rows in enumerate(layer.rotary_rows):
        spoken = torch.complex(keys[:, rows[:, 0]], keys[:, rows[:, 1]])
        for count in (1, 2, 3):
            kept = factorizer.inward[f, :count]
            for scale in (0.0, 1e-2, 1.0):
                noise = torch.randn(count, HEADS, dtype=torch.complex128, generator=dice)
                rival = spoken @ (kept + scale * kept.abs().mean() * noise).T
                rest = spoken - rival @ torch.linalg.lstsq(rival, spoken).solution
                errors = torch.zeros_like(keys)
                errors[:, rows[:, 0]], errors[:, rows[:, 1]] = rest.real, rest.imag
                error = float(torch.einsum("ni,ij,nj->n", errors, turned, errors).mean())
                least = float(factorizer.worth[f, count:].sum())
                assert error >= least * (1 - 1e-6)
                if not scale:
                    assert error == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("rival", ["inputs", "none"])
def test_the_gradients_weighting_is_the_best_of_the_three_under_its_metric(rival, layer, inputs, metric):
    # Gradients whose moments are the metric's and the inputs': of tokens that are independent.
    covariance = torch.cov(inputs.T, correction=0)
    columns = torch.block_diag(covariance, torch.ones(1, 1, dtype=torch.float64))
    rows = TOKENS * covariance.trace() * metric
    held = LayerStatistics(
        torch.tensor(float(TOKENS), dtype=torch.float64), inputs.sum(0), inputs.T @ inputs, columns, rows
    )
    turned = averaged(layer, metric)
    for pairs, latent in (([4, 4], 4), ([3, 2], 6), ([1, 1], 10)):
        ours, other = (
            LayerFactorizer(layer, *WEIGHTINGS[name](held)).factors(pairs, latent) for name in ("gradients", rival)
        )
        assert brute_force(layer, ours, inputs, turned) < 0.9 * brute_force(layer, other, inputs, turned)


def test_layers_whose_gradients_are_zero_factorize_all_the_same(layer, inputs):
    factorizer = LayerFactorizer(layer, *moments(inputs), torch.zeros(2 * HIDDEN, 2 * HIDDEN, dtype=torch.float64))
    factors = factorizer.factors([2, 1], 3)
    assert factors.error == 0
    assert all(torch.isfinite(part).all() for part in (factors.context_weight, factors.rotary_up, factors.key_up))


def test_pair_counts_keep_the_components_of_most_worth(factorizer):
    flat = [(float(worth), f) for f, row in enumerate(factorizer.worth) for worth in row]
    for total in range(len(flat) + 1):
        best = [f for _, f in sorted(flat, reverse=True)[:total]]
        assert factorizer.pair_counts(total) == [best.count(f) for f in range(FREQUENCIES)]


def test_the_frontier_is_the_best_of_all_splits(factorizer):
    least, choice = factorizer.frontier()
    every = {total: factorizer.errors(factorizer.pair_counts(total)) for total in range(1, HEADS * FREQUENCIES + 1)}
    for width in range(HIDDEN + 1):
        splits = {total: float(errors[width - 2 * total]) for total, errors in every.items() if width >= 2 * total}
        if not splits:
            assert least[width].isinf()
            continue
        best = pytest.approx(min(splits.values()), rel=1e-9, abs=1e-12 * float(least[2]))
        assert float(least[width]) == best and splits[sum(choice[width])] == best
    assert least[-1] < 1e-6 * least[2] and least[:2].isinf().all()


@pytest.mark.parametrize("kind", ["equal dims", "equal heads", "pruned heads"])
@pytest.mark.parametrize("width", [2, 20, HIDDEN])
def test_pairs_that_depend_on_each_other_leave_the_rest_to_the_latent(kind, width, layer, inputs, metric):
    size = HIDDEN // HEADS
    if kind == "equal dims":
        layer.weight[1] = layer.weight[0]
    elif kind == "equal heads":
        layer.weight[size : 2 * size], layer.bias[size : 2 * size] = layer.weight[:size], layer.bias[:size]
    else:
        layer.weight[: 2 * size], layer.bias[: 2 * size] = 0, 0
    factorizer = LayerFactorizer(layer, *moments(inputs), metric)
    least, choice = factorizer.frontier()
    pairs = choice[width]
    factors = factorizer.factors(pairs, width - 2 * sum(pairs))
    rounding = 1e-7 * float(least[2])
    assert factors.error == pytest.approx(float(least[width]), rel=1e-5, abs=rounding)
    assert brute_force(layer, factors, inputs, averaged(layer, metric)) == pytest.approx(
        factors.error, rel=1e-5, abs=rounding
    )


def convex(seed: int, layers: int, widths: int, multiple: int = 1) -> list[torch.Tensor]:
    """Frontiers with ever smaller gains from one multiple to the next, and no room at 0."""
    dice = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(layers):
        gains = torch.rand(widths, dtype=torch.float64, generator=dice).sort(descending=True)[0]
        errors = gains.flip(0).cumsum(0).flip(0).repeat_interleave(multiple)
        errors[0] = torch.inf
        found.append(torch.cat([errors, errors.new_zeros(1)]))
    return found


def total_error(frontiers, widths) -> float:
    return sum(float(errors[width]) for errors, width in zip(frontiers, widths, strict=True))


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("seed", range(2))
def test_widths_are_the_best_there_are_where_gains_shrink(seed, multiple):
    frontiers = convex(seed, layers=3, widths=6, multiple=multiple)
    most = len(frontiers[0]) - 1
    for total in range(3 * multiple, 3 * most + 1, multiple):
        widths = allocate(frontiers, total, multiple)
        rivals = itertools.product(range(multiple, most + 1, multiple), repeat=3)
        best = min(total_error(frontiers, rival) for rival in rivals if sum(rival) == total)
        assert sum(widths) == total and not any(width % multiple for width in widths)
        assert total_error(frontiers, widths) == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_widths_jump_over_dents_of_a_frontier(factorizer):
    dented = torch.tensor([torch.inf, 10.0, 9.9, 9.8, 1.0, 0.9], dtype=torch.float64)
    smooth = torch.tensor([torch.inf, 3.0, 2.0, 1.5, 1.2, 1.0], dtype=torch.float64)
    assert allocate([dented, smooth], 5) == [4, 1]
    assert allocate([dented, smooth], 2) == [1, 1] and allocate([dented, smooth], 10) == [5, 5]


def test_the_symmetric_root_of_a_complex_matrix_and_its_ridge():
    noise = torch.randn(5, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    matrix = noise @ noise.mH
    root = symmetric_root(matrix)
    torch.testing.assert_close(root, root.mH)
    torch.testing.assert_close(root @ root, matrix, rtol=0, atol=1e-7)
    assert torch.linalg.eigvalsh(root)[0] > 0
