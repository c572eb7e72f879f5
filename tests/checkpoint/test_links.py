"""Links of every sort, on every command: followed where they lead to a checkpoint, named where they lead nowhere."""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from nemo_skymoe.checkpoint.companions import companion_names
from nemo_skymoe.cli import app
from tests.checkpoint import hf_models

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2}
NAMES = ("model.safetensors", "config.json", "tokenizer.json", "LICENSE")


def skymoe(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a file of every kind."""
    folder = tmp_path / "source"
    hf_models.skywork_dense(folder, **SMALL, num_key_value_heads=2, vocab_size=40)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    (folder / "LICENSE").write_text("terms")
    assert sorted(file.name for file in folder.iterdir()) == sorted(NAMES)
    return folder


@pytest.fixture
def nemo(source: Path) -> Path:
    """The same in NeMo's form."""
    assert skymoe("convert", source, source.parent / "nemo", "--to", "nemo").exit_code == 0
    return source.parent / "nemo"


def linked(folder: Path, place: Path, files: Iterable[Path]) -> Path:
    """A copy of a folder, some files of which lie in `place` under the same names, with links to them."""
    shutil.copytree(folder, place / "all")
    for file in files:
        (place / file.name).parent.mkdir(exist_ok=True)
        shutil.move(place / "all" / file, place / file.name)
        (place / "all" / file).symlink_to(place / file.name)
    return place / "all"


def test_a_checkpoint_is_the_same_however_links_lead_to_it(source: Path, nemo: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--a--b/snapshots/rev"
    (blobs := tmp_path / "hub/models--a--b/blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    local = tmp_path / "local"
    local.mkdir()
    for number, file in enumerate(source.iterdir()):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
        (local / file.name).symlink_to(blobs / f"{number:040x}")
    (tmp_path / "folder").symlink_to("source")
    apart = linked(source, tmp_path / "disk", map(Path, NAMES))
    for place in (snapshot, local, tmp_path / "folder", apart):
        again = skymoe("convert", place, nemo, "--to", "nemo")
        assert (again.exit_code, "is there already, unchanged" in again.stdout) == (0, True), again.output
        assert skymoe("verify", place, nemo).exit_code == 0
        assert skymoe("inspect", place).exit_code == 0
        assert skymoe("upcycle", place, tmp_path / f"{place.name} moe", "--to", "hf").exit_code == 0
    for folder in (tmp_path / "hub", snapshot.parents[1], snapshot.parent):
        refused = skymoe("inspect", folder)
        assert refused.exit_code == 2 and f"give the one in it that you mean, '{snapshot}'" in refused.output


def test_parts_of_a_nemo_checkpoint_may_lie_elsewhere(nemo: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert skymoe("convert", nemo, back, "--to", "hf").exit_code == 0
    weights = [Path("weights") / file.name for file in (nemo / "weights").iterdir()]
    (tmp_path / "link").symlink_to("nemo")
    apart = [linked(nemo, tmp_path / f"disk {part}", [Path(part)]) for part in ("weights", "context")]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step=1-last").symlink_to(nemo)
    places = [*apart, apart[0] / "weights", linked(nemo, tmp_path / "disk files", weights), tmp_path / "link"]
    for place in (*places, tmp_path / "run"):
        again = skymoe("convert", place, back, "--to", "hf")
        assert (again.exit_code, "is there already, unchanged" in again.stdout) == (0, True), again.output
        assert skymoe("inspect", place).exit_code == 0


def test_verify_follows_the_links_of_a_written_checkpoint(source: Path, nemo: Path, tmp_path: Path) -> None:
    """Its parts on another disk, itself as the last of a run, or the folder of its weights."""
    (tmp_path / "link").symlink_to("nemo")
    apart = [linked(nemo, tmp_path / f"disk {part}", [Path(part)]) for part in ("weights", "context")]
    weights = [Path("weights") / file.name for file in (nemo / "weights").iterdir()]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step=1-last").symlink_to(nemo)
    places = (
        *(tmp_path / "link", *apart, linked(nemo, tmp_path / "disk files", weights)),
        *(tmp_path / "run", nemo / "weights", apart[0] / "weights"),
    )
    for place in places:
        found = skymoe("verify", source, place)
        assert (found.exit_code, "every bit as expected" in found.stdout) == (0, True), found.output


def test_verify_says_what_is_there_and_what_is_not_through_links(
    source: Path, nemo: Path, tmp_path: Path
) -> None:
    apart = [linked(nemo, tmp_path / f"disk {part}", [Path(part)]) for part in ("weights", "context")]
    (stray := apart[0] / "weights" / "stray").write_text("x")
    found = skymoe("verify", source, apart[0])
    assert found.exit_code == 1 and "'weights/stray' was not written with the rest" in found.output
    stray.unlink()
    damaged = tmp_path / "disk weights/weights/__0_0.distcp"
    damaged.rename(tmp_path / "away")
    found = skymoe("verify", source, apart[0])
    assert found.exit_code == 1 and "'weights/__0_0.distcp' is missing" in found.output
    (tmp_path / "away").rename(damaged)
    for link, leads in (("weights/loop", ".."), ("all", "/"), ("self", "self"), ("weights/none", "nowhere")):
        (apart[0] / link).symlink_to(leads)
        found = skymoe("verify", source, apart[0])
        assert found.exit_code == 1 and f"'{link}' was not written with the rest" in found.output
        assert found.output.count("was not written") == 1
        (apart[0] / link).unlink()
    for leads in (".", "LICENSE", "nowhere"):
        (apart[1] / "context/tokenizer/LICENSE").rename(tmp_path / "LICENSE")
        (apart[1] / "context/tokenizer/LICENSE").symlink_to(leads)
        found = skymoe("verify", source, apart[1])
        assert found.exit_code in (1, 2) and "LICENSE'" in found.output, found.output
        assert found.exception.__class__ is SystemExit
        (apart[1] / "context/tokenizer/LICENSE").unlink()
        (tmp_path / "LICENSE").rename(apart[1] / "context/tokenizer/LICENSE")
    assert skymoe("verify", source, apart[1]).exit_code == 0


def test_verify_says_which_checkpoint_it_would_take(source: Path, nemo: Path, tmp_path: Path) -> None:
    """The hub's folder of a model and a run without checkpoints, as target and as source, as on every command."""
    snapshot = tmp_path / "hub/models--a--b/snapshots/rev"
    shutil.copytree(source, snapshot)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    for arguments in ((source, tmp_path / "hub"), (tmp_path / "hub", nemo), (snapshot.parents[1], nemo)):
        refused = skymoe("verify", *arguments)
        assert refused.exit_code == 2 and f"give the one in it that you mean, '{snapshot}'" in refused.output
    refused = skymoe("verify", source, tmp_path / "empty")
    assert refused.exit_code == 2 and "the run has not saved a checkpoint yet" in refused.output
    for arguments in ((source, tmp_path / "nowhere"), (tmp_path / "nowhere", nemo)):
        refused = skymoe("verify", *arguments)
        assert refused.exit_code == 2 and f"'{tmp_path / 'nowhere'}'" in refused.output, refused.output
        assert refused.exception.__class__ is SystemExit and len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("target", ["nowhere/at/all", "itself"])
def test_a_link_that_leads_nowhere_is_named(target: str, source: Path, nemo: Path, tmp_path: Path) -> None:
    def broken(link: Path) -> Path:
        link.symlink_to(link.name if target == "itself" else target)
        return link

    places = {broken(tmp_path / "folder"): tmp_path / "folder"}
    for name in NAMES:
        shutil.copytree(source, folder := tmp_path / f"without {name}")
        (folder / name).unlink()
        places[folder] = broken(folder / name)
    shutil.copytree(nemo, tmp_path / "without weights", ignore=lambda *_: ["weights"])
    places[tmp_path / "without weights"] = broken(tmp_path / "without weights/weights")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    places[tmp_path / "run"] = broken(tmp_path / "run/checkpoints/step=1-last")
    for folder, link in places.items():
        for command in ("inspect", "convert", "upcycle"):
            options = [] if command == "inspect" else [tmp_path / "out", "--to", "hf"]
            refused = skymoe(command, folder, *options)
            assert refused.exit_code in (1, 2) and refused.exception.__class__ is SystemExit
            (line,) = refused.stderr.splitlines()
            assert f"'{link}'" in line and f"link to '{os.readlink(link)}'" in line and "opened" in line, line
    assert not (tmp_path / "out").exists()


def test_an_output_below_what_is_no_folder_is_refused_by_a_dry_run_too(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    for place in ("loop", "file"):
        for options in (["--dry-run"], []):
            refused = skymoe("convert", source, tmp_path / place / "out", "--to", "hf", *options)
            assert refused.exit_code == 2 and f"{tmp_path / place}" in refused.stderr, refused.output


def test_a_folder_is_no_licence(source: Path) -> None:
    (source / "licenses").mkdir()
    assert companion_names(source) == ["LICENSE", "tokenizer.json"]
