"""One thread, a private cache and a tiny model: what every test that trains something stands on."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # without network, each name that is not there would cost 24 s
# pytest puts tests/ on the path, where folders without __init__.py bear the names of the packages under test
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parent / "support"))

import hypothesis
import pytest
import torch
from tiny_runs import save_tiny_model

torch.set_num_threads(1)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which commands would inherit as ignored under nohup
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables are built once per session, away from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BETA_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_launcher_and_no_seed() -> Iterator[None]:
    """Forget what a run leaves in the environment: a later one would take its launcher and its seed for its own."""
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama over the tokens of the controlled task."""
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")
