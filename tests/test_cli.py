"""The `skymoe` command as a user meets it: its speed, its exit codes and what it says when refused."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from typer.testing import CliRunner

from nemo_skymoe import __version__
from nemo_skymoe.cli import app
from tests.cases import every
from tests.waiting import HANG, wait_until

SKYMOE = str(Path(sys.executable).with_name("skymoe"))
# Every package that this project asks for but typer, which prints the help.
HEAVY = {
    *(
        "torch",
        "megatron",
        "numpy",
        "yaml",
        "zlib_ng",
        "rich",
        "nemo",
        "nemo_run",
        "lightning",
        "hydra",
        "modelopt",
    ),
    *("datasets", "pyarrow", "pandas", "einops", "sentencepiece", "tiktoken", "tensorstore", "tensorboard"),
    *("tokenizers", "safetensors", "matplotlib", "transformers", "lm_eval", "transformer_engine"),
}
COMMANDS = ("doctor", "demo", "corpus", "report", "inspect", "convert", "upcycle", "verify")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG)


def with_probe(body: str) -> list[str]:
    """The real command line with one more command, `probe`, that runs `body`."""
    lines = [
        "from nemo_skymoe import cli",
        "@cli.app.command()",
        "def probe():",
        textwrap.indent(textwrap.dedent(body), "    "),
    ]
    return [sys.executable, "-c", "\n".join([*lines, "cli.main()"]), "probe"]


def test_help_imports_nothing_heavy():
    """Neither of the whole command nor of any of its commands."""
    code = f"""
        import sys
        from nemo_skymoe import cli
        for arguments in ([], *([command] for command in {COMMANDS})):
            try:
                cli.app([*arguments, "--help"])
            except SystemExit as exit:
                assert exit.code == 0, arguments
            assert not {HEAVY} & set(sys.modules), (arguments, {HEAVY} & set(sys.modules))
    """
    answer = run(sys.executable, "-c", textwrap.dedent(code))
    assert answer.returncode == 0, answer.stderr
    assert all(command in answer.stdout for command in COMMANDS)


@every("command", [(SKYMOE,), (sys.executable, "-m", "nemo_skymoe")])
def test_version(command: tuple[str, ...]):
    answer = run(*command, "--version")
    assert (answer.returncode, answer.stdout) == (0, f"nemo-skymoe {__version__}\n")


def test_every_command_is_listed():
    listed = CliRunner().invoke(app, ["--help"]).output
    assert all(f"\n  {command} " in listed for command in COMMANDS)


def test_refused_configuration_is_one_sentence(tmp_path: Path):
    answer = run(SKYMOE, "report", str(tmp_path))
    assert answer.returncode == 2
    assert answer.stderr.startswith("skymoe: ") and str(tmp_path) in answer.stderr
    assert answer.stderr.count("\n") == 1 and answer.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_failed_rank_shows_its_traceback_and_no_other():
    answer = run(
        *with_probe("""
            from nemo_skymoe.ranks import run_ranks
            def divide():
                return 1 / 0
            run_ranks(divide, 1)
        """)
    )
    assert answer.returncode == 1
    assert answer.stderr.startswith("skymoe: rank 0 of 1 failed:\nTraceback")
    assert answer.stderr.count("Traceback") == 1 and "ZeroDivisionError" in answer.stderr


def test_a_file_that_cannot_be_written_is_one_line():
    answer = run(*with_probe("open('/proc/no/such/file', 'w')"))
    assert answer.returncode == 1
    assert answer.stderr == "skymoe: [Errno 2] No such file or directory: '/proc/no/such/file'\n"


def test_our_own_faults_keep_their_traceback():
    answer = run(*with_probe("raise KeyError('unexpected')"))
    assert answer.returncode == 1
    assert answer.stderr.startswith("Traceback") and "KeyError: 'unexpected'" in answer.stderr


def test_interrupt_is_quiet_and_takes_the_ranks_along(tmp_path: Path):
    body = f"""
        import os, pathlib, time
        from nemo_skymoe.ranks import run_ranks
        def stuck():
            pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()
            time.sleep(600)
        run_ranks(stuck, 2)
    """
    process = subprocess.Popen(
        with_probe(body),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background of a script is started deaf to Ctrl-C, and so would be its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until("the start of the ranks", lambda: len(list(tmp_path.iterdir())) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    _, errors = process.communicate(timeout=HANG)
    assert (process.returncode, errors) == (130, "")
    wait_until(
        "the end of the ranks",
        lambda: not any(Path("/proc", rank.name).exists() for rank in tmp_path.iterdir()),
        hang=300,  # on their own they would end after twice that
    )


def test_warnings_of_dependencies_are_shown_only_on_demand():
    probe = with_probe("import warnings; warnings.warn('no GPU')")
    assert run(*probe).stderr == ""
    assert "no GPU" in run(probe[0], "-Wdefault", *probe[1:]).stderr


@every("arguments", [["no-such-command"], ["report"], ["corpus", "somewhere", "--vocab-size", "many"]])
def test_usage_errors_exit_with_2(arguments: list[str]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.output and result.exc_info is not None and result.exc_info[0] is SystemExit


def test_report_writes_its_page(tmp_path: Path):
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step in range(5):
            writer.add_scalar("reduced_train_loss", 5.0 - step, step)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--output", str(tmp_path / "page")])
    assert result.exit_code == 0, result.output
    assert result.output == f"{tmp_path / 'page' / 'report.html'}\n"
    assert (tmp_path / "page" / "report.html").stat().st_size > 1000


def test_corpus_refuses_before_writing(tmp_path: Path):
    result = CliRunner().invoke(app, ["corpus", str(tmp_path / "corpus"), "--vocab-size", "5"])
    assert result.exit_code == 2
    assert "skymoe: vocab_size is 5" in result.output
    assert not (tmp_path / "corpus").exists()
