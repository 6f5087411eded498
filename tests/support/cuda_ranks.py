"""One of two ranks on the stand-in for a CUDA device, under DDP over gloo; started by tests/test_cuda_runs.py.

`python cuda_ranks.py FOLDER MODEL SPOILT`: leaves the final weights of every run of RUNS in FOLDER/<name>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from cuda_runs import StandInAccelerator, cuda_stand_in, cuda_trainer  # noqa: E402
from cuda_stand_in import CUDA  # noqa: E402
from lightning.pytorch.plugins.precision import Precision  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402
from tiny_runs import beta_dpo, controlled, preference, weights  # noqa: E402

# name: callbacks, model
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "beta-dpo": (beta_dpo, {}),
    "plain": (list, {}),
    "cached": (beta_dpo, {"reference": "cached"}),
    "spoilt": (list, {"spoilt": True}),
}
DATA = {"micro_batch_tokens": 115}


class StandInDDP(DDPStrategy):
    """DDP whose ranks all believe that they have the one device."""

    root_device = property(lambda self: CUDA)

    def determine_ddp_device_ids(self) -> None:
        return None


def strategy() -> StandInDDP:
    return StandInDDP(
        accelerator=StandInAccelerator(),
        precision_plugin=Precision(),
        process_group_backend="gloo",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    # here, because Lightning would bind the group to the device
    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    folder, models = Path(sys.argv[1]), sys.argv[2:]
    for name, (hooks, settings) in RUNS.items():
        module = preference(models[settings.get("spoilt", False)], reference=settings.get("reference", "frozen"))
        with cuda_stand_in() as device:
            trainer = cuda_trainer(folder, hooks(), strategy=strategy(), devices=2, max_steps=2)
            trainer.fit(module, controlled(20, **DATA))
            assert device.violations == []
        assert module.nonfinite_pairs == int(name == "spoilt")
        if torch.distributed.get_rank() == 0:
            final = {parameter: tensor.cpu() for parameter, tensor in weights(module).items()}
            torch.save(final, folder / f"{name}.pt")
