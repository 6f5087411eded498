"""Two ranks, replicated or sharded, do what one rank does under the parts that look at the whole batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_runs import run_ranks
from distributed_arms import train_arm
from distributed_run import SCENARIOS, STRATEGIES
from tiny_runs import relative_difference


@pytest.fixture(scope="module")
def two_ranks(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-ranks-arms")
    script = Path(__file__).with_name("distributed_arms.py")
    run_ranks(script, tiny_llama, str(folder), logs=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_equal_one_in_every_part(scenario: str, two_ranks: Path, tiny_llama: str, tmp_path: Path) -> None:
    expected_final = train_arm(tiny_llama, tmp_path, *SCENARIOS[scenario])
    expected = pq.read_table(tmp_path / "audit").to_pandas()
    assert expected["beta"].nunique() > 2
    for strategy in STRATEGIES:
        seen = pq.read_table(two_ranks / f"{strategy}-{scenario}" / "audit").to_pandas()
        assert seen["pair_id"].tolist() == expected["pair_id"].tolist()
        assert seen["kept"].tolist() == expected["kept"].tolist()
        np.testing.assert_allclose(seen["gap"], expected["gap"], atol=1e-3)
        np.testing.assert_allclose(seen["beta"], expected["beta"], rtol=1e-6)
        final = torch.load(two_ranks / f"{strategy}-{scenario}" / "final.pt", weights_only=True)
        assert float(final.pop("val/loss")) == pytest.approx(float(expected_final["val/loss"]), rel=1e-4)
        torch.testing.assert_close(final.pop("kl"), expected_final["kl"], rtol=1e-3, atol=1e-5)
        alone = {name: tensor for name, tensor in expected_final.items() if name not in ("val/loss", "kl")}
        assert relative_difference(alone, final) < 1e-4
