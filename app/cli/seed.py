"""The seed of a run, which is given, or picked and recorded."""

from __future__ import annotations

import logging
import os
import secrets

from app.core.errors import UserError
from app.method.ranges import LARGEST_SEED

log = logging.getLogger(__name__)


def settled_seed(seed: bool | int | None, *, resumes: bool = False, nodes: int = 1) -> int:
    """Return the seed for `seed_everything`: the given number, or a picked one for null and true.

    `resumes` says that the run resumes from a checkpoint, if there is one. A rank that Lightning starts finds the
    seed of rank 0 in PL_GLOBAL_SEED. Raises UserError for false, for a number out of range, and if a picked seed
    would differ between processes or after a restart.
    """
    if seed is False:
        raise UserError("seed_everything: every run has a seed; give a number, or null to have one picked.")
    handed_down = os.environ.get("PL_GLOBAL_SEED")
    if seed is None or seed is True:
        if handed_down is None:
            cure = "give --seed_everything a number"
            if resumes:
                raise UserError(
                    "--ckpt_path needs the seed of the run, or its data and draws would change when it is resumed: "
                    f"{cure}; a run's config.yaml holds the one that it had."
                )
            # torchrun and srun start the processes separately, and each would pick another seed
            processes = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1"
            if nodes > 1 or processes != "1":
                raise UserError(
                    f"seed_everything: processes that are started apart cannot agree on a picked seed; {cure}."
                )
            seed = secrets.randbelow(LARGEST_SEED + 1)
            log.info("seed_everything: picked %d, which config.yaml in the log folder records", seed)
        elif handed_down.isdecimal():
            seed = int(handed_down)
            # not of a rank that Lightning starts; a second run in one process finds the seed of the first
            if "LOCAL_RANK" not in os.environ:
                log.info("seed_everything: %d, from the environment variable PL_GLOBAL_SEED", seed)
        else:
            raise UserError(f"The environment variable PL_GLOBAL_SEED is not a number from 0: {handed_down!r}.")
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed_everything must lie between 0 and {LARGEST_SEED}, not {seed}.")
    return seed
