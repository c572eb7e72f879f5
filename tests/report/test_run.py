import subprocess
import sys

import pytest

from nemo_skymoe.config import ConfigurationError
from nemo_skymoe.report.run import report_run


def test_a_run_is_reported_from_its_logs_alone(write_events, tmp_path):
    steps = range(20)
    scalars = {
        "reduced_train_loss": {step: 5.0 - step / 10 for step in steps},
        "val_loss": {9: 4.4, 19: 3.3},
        "lr": {step: 3e-4 * (1 - step / 40) for step in steps},
        "consumed_samples": {step: 64.0 * (step + 1) for step in steps},
        **{f"moe/drop_rate_layer_{n}": {step: n / 100 for step in steps} for n in (1, 2, 3)},
    }
    run_dir = write_events("tb_logs/version_0", scalars)
    page = report_run(run_dir)
    assert page == run_dir / "report" / "report.html"
    html = page.read_text("utf-8")
    assert "cover the optimizer steps 0 to 19" in html
    assert "consumed 1,280 sequences" in html
    assert "observed in 3 MoE layers" in html
    assert "Left out" in html
    row = "<td>Token drop rate</td><td class=number>0.01000</td><td class=number>1</td><td class=number>0.02000</td>"
    assert row in html
    losses = "<td>Validation</td><td class=number>9</td><td class=number>4.400</td><td class=number>19</td>"
    assert losses in html
    # The report lies below the run, and reporting again reads only the logs.
    before = page.read_bytes()
    assert report_run(run_dir).read_bytes() == before
    assert report_run(run_dir, tmp_path / "elsewhere") == tmp_path / "elsewhere" / "report.html"


def test_the_logs_of_megatron_bridge_are_reported_by_their_own_tags(write_events):
    scalars = {
        "lm loss": {1: 5.0, 2: 4.0},
        "lm loss validation": {2: 4.4},
        "learning-rate": {1: 1e-3, 2: 3e-4},
    }
    html = report_run(write_events("", scalars)).read_text("utf-8")
    assert "The last learning rate is 0.0003, the highest 0.001." in html
    assert "<td>Training</td><td class=number>1</td><td class=number>5.000</td>" in html
    assert "<td>Validation</td><td class=number>2</td><td class=number>4.400</td>" in html


def test_the_logs_of_a_recipes_run_are_found_beside_it(write_events, tmp_path):
    logs = write_events("", {"reduced_train_loss": {0: 5.0, 1: 4.0}})
    (tmp_path / "tensorboard").mkdir()
    logs.rename(tmp_path / "tensorboard" / "run")
    logs.mkdir()
    assert report_run(logs) == logs / "report" / "report.html"


def test_a_dense_run_has_no_router_table(write_events):
    html = report_run(write_events("", {"reduced_train_loss": {0: 3.0, 1: float("nan")}})).read_text("utf-8")
    assert "no router telemetry" in html and "The router at the end" not in html
    assert "<td class=number>nan</td>" in html


def test_a_directory_without_logs_is_refused_and_left_alone(tmp_path):
    with pytest.raises(ConfigurationError, match="no TensorBoard event file"):
        report_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_report_loads_no_heavy_library():
    heavy = "matplotlib", "tensorboard", "torch", "pandas"
    code = f"import sys, nemo_skymoe.report.run; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
