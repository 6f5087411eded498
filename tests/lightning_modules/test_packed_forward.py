"""Packed rows give the log-probabilities and gradients of plain rows, whatever the family of the model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stand_in import StandIn
from tiny_runs import VOCABULARY, plain_logps, tiny_model
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from app.method.batch import Layout, PackedRows
from datamodules.batches import pack
from datamodules.records import TokenisedPair
from lightning_modules import scorer as scoring
from lightning_modules.attention import dense_mask, one_row
from lightning_modules.flex import BLOCK, block_mask, block_tensors
from lightning_modules.pretrained import store_linear_weights
from lightning_modules.scorer import LogitRule, ResponseScorer, head_logits, head_logps

PACKABLE = (
    "llama",
    "gpt_neox",
    "gpt2",
    "qwen2",
    "qwen3",
    "mistral",
    "mistral_window",
    "gemma2",
    "phi3",
    "opt",
    "gptj",
)
SIDES = ("chosen", "rejected")
EOS = 2


def random_pairs(seed: int = 0) -> list[TokenisedPair]:
    """Pairs with prompts and responses of every length from one token up; each response ends in EOS."""
    rng = np.random.default_rng(seed)

    def tokens(length: int, eos: bool) -> np.ndarray:
        ids = rng.integers(3, VOCABULARY, length)
        if eos:
            ids[-1] = EOS
        return ids

    shapes = [(1, 1, 5), (1, 9, 1), (12, 4, 7), (3, 1, 1), (7, 10, 2), (20, 3, 13)]
    return [TokenisedPair(tokens(p, False), tokens(c, True), tokens(r, True)) for p, c, r in shapes]


def plain_sums(model: Any, pairs: list[TokenisedPair]) -> torch.Tensor:
    """[pairs, 2] by one plain row per response."""
    return torch.stack(
        [
            torch.stack([plain_logps(model, p.prompt, side).double().sum() for side in (p.chosen, p.rejected)])
            for p in pairs
            if p.rejected is not None
        ]
    )


def score(scorer: ResponseScorer, pairs: list[TokenisedPair], layout: Layout, budget: int) -> torch.Tensor:
    """[pairs, 2] by the project; an infinite `balanced_row` asks for rows as long as the budget allows."""
    sums = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for rows in pack(pairs, range(len(pairs)), SIDES, layout, budget, math.inf):
        sums = sums.index_copy(0, rows.pairs, scorer(rows).view(-1, 2))
    return sums


def scorer_of(model: Any, attention: str) -> ResponseScorer:
    scorer = ResponseScorer(model)
    if attention == "pairwise":
        scorer.use_attention(attention)
    return scorer


@pytest.mark.parametrize("attention", ["own", "pairwise"])
@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize(("layout", "budget"), [("packed", 1000), ("packed", 80), ("separate", 100)])
def test_equal_to_plain_rows(family: str, layout: Layout, budget: int, attention: str) -> None:
    if attention == "pairwise" and family in ("gemma2", "gptj"):
        pytest.skip("attention pair by pair has no soft cap, and GPT-J an attention of its own")
    model, pairs = tiny_model(family), random_pairs()
    with torch.no_grad():
        expected = plain_sums(model, pairs)
        seen = score(scorer_of(model, attention), pairs, layout, budget)
    assert float((seen - expected).abs().max()) < 1e-4
    assert float(expected.std()) > 1  # else a wrong mask could pass


@pytest.mark.parametrize("family", PACKABLE)
def test_a_mask_that_lets_pairs_see_each_other_would_be_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(rows: Any, attention: str, config: Any) -> torch.Tensor:
        width = rows.input_ids.shape[1]
        return torch.ones(1, 1, width, width, dtype=torch.bool).tril()

    monkeypatch.setattr("lightning_modules.attention.masks", careless)
    model, pairs = tiny_model(family), random_pairs()
    with torch.no_grad():
        apart = (score(ResponseScorer(model), pairs, "packed", 1000) - plain_sums(model, pairs)).abs().max()
    assert float(apart) > 0.1


@pytest.mark.parametrize("attention", ["own", "pairwise"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window", "gemma2"])
@pytest.mark.parametrize("slice_logits", [1, 100, 1500, None])
def test_gradients_equal_those_of_plain_rows(
    family: str, slice_logits: int | None, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slice_logits is not None:
        monkeypatch.setitem(scoring.SLICE_LOGITS, "cpu", slice_logits)
        monkeypatch.setattr(scoring, "NARROWEST_SLICE", 1)
    pairs = random_pairs()
    plain, packed = tiny_model(family), tiny_model(family)
    if attention == "pairwise":
        if family == "gemma2":
            pytest.skip("attention pair by pair has no soft cap")
        packed.set_attn_implementation(attention)
    weight = torch.linspace(-1, 1, 2 * len(pairs), dtype=torch.float64).view(-1, 2)
    (plain_sums(plain, pairs) * weight).sum().backward()
    (score(ResponseScorer(packed), pairs, "packed", 1000) * weight).sum().backward()
    for (name, expected), seen in zip(plain.named_parameters(), packed.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(seen.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels need CUDA")
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral_window"])
def test_flex_attention_on_cuda_equals_plain_rows(family: str) -> None:
    pairs = [pair for seed in range(8) for pair in random_pairs(seed)]
    weight = torch.linspace(-1, 1, 2 * len(pairs), dtype=torch.float64).view(-1, 2).cuda()
    sizes = {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4}  # kernels want heads of 16 and more
    plain, packed = (tiny_model(family, **sizes).cuda() for _ in range(2))
    expected = torch.stack(
        [
            torch.stack([plain_logps_on(plain, p.prompt, side) for side in (p.chosen, p.rejected)])
            for p in pairs
            if p.rejected is not None
        ]
    )
    scorer = ResponseScorer(packed)
    scorer.use_attention("flex")
    seen = torch.zeros_like(expected)
    for rows in pack(pairs, range(len(pairs)), SIDES, "packed", 4096, math.inf):
        rows = rows.to("cuda")
        seen = seen.index_copy(0, rows.pairs, scorer(rows).view(-1, 2))
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-3)
    (expected * weight).sum().backward()
    (seen * weight).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)


def plain_logps_on(model: Any, prompt: np.ndarray, response: np.ndarray) -> torch.Tensor:
    """Summed log-probability of a response by one plain row, where the model is."""
    ids = torch.from_numpy(np.concatenate([prompt, response])).to(model.device)
    logps = torch.log_softmax(model(input_ids=ids[None]).logits.float(), dim=-1)[0, len(prompt) - 1 : -1]
    return logps.gather(-1, ids[len(prompt) :, None]).double().sum()


@pytest.mark.parametrize("attention", ["own", "pairwise"])
def test_bf16_autocast_stays_within_a_hundredth(attention: str) -> None:
    model, pairs = tiny_model("llama"), random_pairs()
    weight = torch.linspace(-1, 1, 2 * len(pairs), dtype=torch.float64).view(-1, 2)
    scorer = scorer_of(model, attention)
    gradients = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            sums = score(scorer, pairs, "packed", 1000)
        (sums * weight).sum().backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        gradients.append((sums.detach(), flat))
    (exact, exact_gradient), (rounded, rounded_gradient) = gradients
    assert float((rounded - exact).norm() / exact.norm()) < 1e-2
    # the gradient of a random two-layer model is a sum that mostly cancels
    assert float((rounded_gradient - exact_gradient).norm() / exact_gradient.norm()) < 5e-2


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "qwen2", "gemma2", "phi3", "opt", "gptj"])
def test_linear_weights_kept_in_the_type_of_autocast_give_the_same_bits(family: str) -> None:
    model, pairs = tiny_model(family).requires_grad_(False), random_pairs()
    scorer = scorer_of(model, "own")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        recast = score(scorer, pairs, "packed", 1000)
        store_linear_weights(model, torch.bfloat16)
        assert torch.equal(score(scorer, pairs, "packed", 1000), recast)
    # what is added or looked up, rather than multiplied, is as it was
    kept = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert {name for name in kept if "norm" in name or "ln_" in name or "bias" in name}
    assert model.get_input_embeddings().weight.dtype == torch.float32
    if family != "gpt2":  # its layers are Conv1D
        assert len(kept) < len(list(model.parameters()))


def test_logits_on_cuda_are_not_rounded_to_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (50, 80))
    exact = hidden.double() @ weight.double().t()
    with StandIn() as device:
        wide = head_logits(hidden.to("cuda"), weight.to("cuda"), None, LogitRule())
        assert wide.dtype == torch.float32
        assert device.violations == []
        assert float((wide.cpu() - exact).abs().max()) < 1e-4
    rounded = head_logits(hidden, weight, None, LogitRule())
    assert float((rounded - exact).abs().max()) > 1e-2


def test_the_head_computes_in_one_dtype_in_both_passes() -> None:
    # on CUDA the backward pass runs in another thread, where autocast has another dtype, as outside of its block
    generator = torch.Generator().manual_seed(0)
    given, weight = (torch.randn(n, 16, generator=generator) for n in (6, 40))
    gradients = []
    for inside in (True, False):
        hidden = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logps = head_logps(hidden, weight, None, torch.arange(6), LogitRule()).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            (gradient,) = torch.autograd.grad(logps, hidden)
        gradients.append(gradient)
    assert torch.equal(*gradients)


def test_padding_that_equals_eos_is_no_matter() -> None:
    # plain rows padded with the EOS id, in one batch: the project's mask and not the id tells padding
    model, pairs = tiny_model("llama"), random_pairs()
    scorer = ResponseScorer(model)
    (rows,) = pack(pairs, range(len(pairs)), SIDES, "separate", 1000, math.inf)
    with torch.no_grad():
        before = scorer(rows)
        rows.input_ids[rows.group < 0] = EOS
        torch.testing.assert_close(scorer(rows), before, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            before.view(-1, 2)[rows.pairs.argsort()], plain_sums(model, pairs), atol=1e-4, rtol=0
        )


def test_rows_without_a_response_still_reach_every_parameter() -> None:
    # what a rank runs that has a micro-batch less: the collectives of a sharded backward pass must match
    model = tiny_model("llama")
    scored = ResponseScorer(model)(PackedRows.empty())
    assert scored.shape == (0,)
    scored.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("window", [None, 1, 3, 9, 200])
@pytest.mark.parametrize("layout", ["packed", "separate"])
def test_the_block_mask_is_the_dense_mask(layout: Layout, window: int | None) -> None:
    pairs = [pair for seed in range(6) for pair in random_pairs(seed)]  # rows of several blocks
    long = np.arange(3, 103)
    pairs.append(
        TokenisedPair(np.resize(long, 300), np.resize(long, 290), np.resize(long, 140))
    )  # with full blocks
    for rows in pack(pairs, range(len(pairs)), SIDES, layout, 1400, math.inf):
        runs = one_row(rows, BLOCK)["pair_runs"]
        width = sum(run.tokens for run in runs.runs)
        block = block_mask(block_tensors(runs, window, torch.device("cpu")), width)
        seen = create_mask(block.mask_mod, 1, 1, width, width, device="cpu")
        real = rows.group.flatten() >= 0  # padding sees padding, as it likes
        tokens = len(real)
        expected = torch.block_diag(*dense_mask(rows, window)[:, 0].int()).bool()
        assert torch.equal(seen[0, 0, :tokens, :tokens][real], expected[real])
        assert seen.any(-1).all()  # no empty softmax
        side = width // BLOCK
        counts = seen.view(side, BLOCK, side, BLOCK).sum((1, 3))
        assert torch.equal(block.to_dense()[0, 0].bool(), counts > 0)
        full = torch.zeros(side, side, dtype=torch.bool)
        assert block.full_kv_num_blocks is not None
        assert block.full_kv_indices is not None
        for query, number in enumerate(block.full_kv_num_blocks[0, 0].tolist()):
            full[query, block.full_kv_indices[0, 0, query, :number].long()] = True
        assert torch.equal(full, counts == BLOCK * BLOCK)
        built = create_block_mask(block.mask_mod, 1, None, width, width, device="cpu")
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(block, name), getattr(built, name))
