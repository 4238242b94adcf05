import os
from pathlib import Path

import lightning as L
import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported

# The same examples in every run, however slow the machine is.
settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _quiet_and_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    L.seed_everything(7, verbose=False)
