"""The guard; what the patch is for is in tests/launch/test_hostile_values.py."""

from typing import Any

import pytest

from nemo_skymoe.patches import executor_values


def test_applied_once_and_only_where_nemo_run_does_not_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_run.core.execution.slurm import SlurmBatchRequest
    from nemo_run.run.torchx_backend.schedulers import local, slurm

    monkeypatch.setattr(slurm, "SlurmBatchRequest", SlurmBatchRequest)
    for scheduler in (slurm.SlurmTunnelScheduler, local.PersistentLocalScheduler):
        monkeypatch.setattr(scheduler, "_submit_dryrun", scheduler._submit_dryrun)
    assert executor_values.apply() and not executor_values.apply()

    class Cured(SlurmBatchRequest):
        def materialize(self) -> str:
            return "export probe='a b'"

    cured: Any = Cured
    monkeypatch.setattr(slurm, "SlurmBatchRequest", cured)
    assert not executor_values.apply() and slurm.SlurmBatchRequest is cured
