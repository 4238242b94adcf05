from pathlib import Path

import lightning as L
import pytest


@pytest.fixture(autouse=True)
def _quiet_and_seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    L.seed_everything(7, verbose=False)
