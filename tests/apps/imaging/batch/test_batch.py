"""The driver: which directories it takes, what it writes, shards, and an early end."""

import json
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from apps.imaging.batch.driver import Outcome, run_batch
from apps.imaging.batch.evidence import signing_key
from apps.imaging.batch.manifest import read_manifest
from apps.imaging.batch.plan import Batch, Shard, open_batch
from apps.imaging.batch.progress import Tally
from apps.imaging.batch.workers import WorkerPlan, WorkerSettings
from apps.imaging.reading.source import Inventory
from cluster.errors import ConfigurationError
from tests.apps.imaging.batch.small_batch import (
    APPLICATION,
    ThreadCrew,
    discover,
    hire_thread,
    make_input,
    run_here,
)


def batch_of(folder: Path, out: Path) -> Batch:
    return Batch(APPLICATION, folder, discover(folder), out)


def begun(folder: Path, out: Path) -> Batch:
    """A batch whose directory was opened and nothing else."""
    batch = batch_of(folder, out)
    open_batch(batch, is_resumed=False).close()
    return batch


def test_a_batch_is_run_once_and_says_so(tmp_path: Path) -> None:
    folder = make_input(tmp_path / "in", [{}, {"how": "unreadable"}, {"how": "raises"}, {}])
    out = tmp_path / "out"
    outcome = run_here(folder, out)
    assert outcome.is_done
    assert outcome.tally == Tally(4, 4, 0, 2, 0)
    manifest = read_manifest(out / "manifest.json")
    assert manifest == json.loads(json.dumps(outcome.manifest))
    assert [case["source"] for case in manifest["cases"]] == [f"{i:03d}.json" for i in range(4)]
    assert [case["status"] for case in manifest["cases"]] == [
        "correct",
        "quarantined",
        "quarantined",
        "correct",
    ]
    assert [case["attempts"] for case in manifest["cases"]] == [1, 1, 3, 1]
    assert manifest["counts"] == {
        "cases": 4,
        "correct": 2,
        "repaired": 0,
        "quarantined": 2,
        "pending": 0,
        "set_aside": 1,
    }
    assert manifest["set_aside"][0]["source"] == "notes.txt"
    assert manifest["model_versions"] == {"small-1": 2}
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    listed = set(manifest["files"])
    assert listed == {name for name in written if not name.startswith(("batch/", "manifest."))}
    assert {"index.html", *manifest["cases"][0]["outputs"].values()} <= listed
    assert {path.name for path in (out / "batch").rglob("*") if path.is_file()} == {
        "journal",
        "finish",
    }


def test_a_finished_batch_is_resumed_without_any_worker(tmp_path: Path) -> None:
    folder, out = make_input(tmp_path / "in", [{}, {}]), tmp_path / "out"
    first = run_here(folder, out).manifest
    (out / "manifest.json").unlink()  # as if the driver was killed while it finished

    def hire(_plan: WorkerPlan) -> AbstractContextManager[ThreadCrew]:
        pytest.fail("no worker is needed")

    outcome = run_batch(
        batch_of(folder, out),
        hire,
        signing_key(tmp_path / "key.pem"),
        is_resumed=True,
        stopping=threading.Event(),
        show=lambda _: None,
    )
    assert outcome.num_before == 2
    assert first is not None
    assert outcome.manifest is not None
    assert read_manifest(out / "manifest.json")["files"] == first["files"]


def test_an_empty_input_has_an_empty_manifest(tmp_path: Path) -> None:
    outcome = run_here(make_input(tmp_path / "in", []), tmp_path / "out")
    assert outcome.manifest is not None
    assert outcome.manifest["cases"] == []
    assert outcome.manifest["complete"]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_directory_with_something_else_is_refused(is_resumed: bool, tmp_path: Path) -> None:
    batch = batch_of(make_input(tmp_path / "in", [{}]), tmp_path / "out")
    batch.out.mkdir()
    (batch.out / "thesis.doc").touch()
    with pytest.raises(ConfigurationError, match="something else"):
        open_batch(batch, is_resumed=is_resumed)
    assert [path.name for path in batch.out.iterdir()] == ["thesis.doc"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    batch = batch_of(make_input(tmp_path / "in", [{}]), tmp_path / "out")
    batch.out.touch()
    with pytest.raises(ConfigurationError, match="something else"):
        open_batch(batch, is_resumed=False)


@pytest.mark.parametrize("is_resumed", [False, True])
@pytest.mark.parametrize("num_made", [0, 1, 2])
def test_what_a_driver_left_that_was_killed_while_it_opened_is_taken(
    num_made: int, is_resumed: bool, tmp_path: Path
) -> None:
    batch = batch_of(make_input(tmp_path / "in", [{}]), tmp_path / "out")
    for name in ("cases", "batch")[:num_made]:
        (batch.out / name).mkdir(parents=True)
    if num_made == 2:
        (batch.out / "batch" / "journal").write_bytes(b'0000 {"form')
    open_batch(batch, is_resumed=is_resumed).close()


def test_a_batch_is_not_gone_on_with_unasked(tmp_path: Path) -> None:
    batch = begun(make_input(tmp_path / "in", [{}, {}]), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="0 of 2 cases done; go on with it by --resume"):
        open_batch(batch, is_resumed=False)
    open_batch(batch, is_resumed=True).close()


def test_another_input_is_refused(tmp_path: Path) -> None:
    first, second = (make_input(tmp_path / name, [{}, {}]) for name in ("in", "other"))
    begun(first, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="another or a changed one"):
        open_batch(batch_of(second, tmp_path / "out"), is_resumed=True)
    (first / "000.json").rename(first / "zzz.json")
    with pytest.raises(ConfigurationError, match="1 cases new, 1 gone"):
        open_batch(batch_of(first, tmp_path / "out"), is_resumed=True)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    batch = begun(make_input(tmp_path / "in", [{}]), tmp_path / "out")
    application = replace(APPLICATION, settings={"task": "small", "depth": 2})
    with pytest.raises(ConfigurationError, match="begun with, depth differ"):
        open_batch(replace(batch, application=application), is_resumed=True)


@pytest.mark.parametrize("case_id", ["", "../out", "a/b", "a.1", "x" * 65])
def test_an_id_that_cannot_name_a_directory_is_refused(case_id: str, tmp_path: Path) -> None:
    batch = batch_of(make_input(tmp_path / "in", [{}]), tmp_path / "out")
    bad = replace(batch.inventory.sources[0], case_id=case_id)
    with pytest.raises(ConfigurationError, match="expected ids"):
        open_batch(replace(batch, inventory=Inventory((bad,), ())), is_resumed=False)


def test_an_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    batch = batch_of(make_input(tmp_path / "in", [{}]), tmp_path / "out")
    twice = Inventory(2 * batch.inventory.sources, ())
    with pytest.raises(ConfigurationError, match="each once"):
        open_batch(replace(batch, inventory=twice), is_resumed=False)


def test_shards_share_a_directory_and_the_last_one_writes_the_whole(tmp_path: Path) -> None:
    folder, out = make_input(tmp_path / "in", [{}] * 5), tmp_path / "out"
    whole = run_here(folder, tmp_path / "whole").manifest
    half = run_here(folder, out, shard="1/2").manifest
    assert half is not None
    assert [case["source"] for case in half["cases"]] == ["001.json", "003.json"]
    assert (half["complete"], half["counts"]["pending"]) == (False, 3)
    with pytest.raises(ConfigurationError, match="--resume"):
        run_here(folder, out, shard="1/2")
    both = run_here(folder, out, shard="0/2").manifest
    assert both is not None
    assert whole is not None
    both_but_time, whole_but_time = (
        {name: value for name, value in each.items() if name != "created_at"}
        for each in (both, whole)
    )
    assert both_but_time == whole_but_time


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_cover_every_case_once(count: int, tmp_path: Path) -> None:
    batch = batch_of(make_input(tmp_path / "in", [{}] * 5), tmp_path / "out")
    parts = [replace(batch, shard=Shard(index, count)).own_sources for index in range(count)]
    assert sorted(each.case_id for part in parts for each in part) == sorted(
        each.case_id for each in batch.inventory.sources
    )


@pytest.mark.parametrize("text", ["2/2", "0/0", "-1/2", "1", "a/b", "1/2/3", ""])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="shard: expected"):
        Shard.parse(text)


def test_told_to_stop_it_ends_early_without_a_manifest_and_goes_on_later(tmp_path: Path) -> None:
    folder = make_input(tmp_path / "in", [{}, {"seconds": 20}, {"seconds": 20}])
    out, stopping, shown = tmp_path / "out", threading.Event(), []

    def show(tally: Tally) -> None:
        shown.append(tally)
        if tally.num_settled == 1:
            stopping.set()

    settings = WorkerSettings(look_s=0.01, drain_s=0.05)
    batch = replace(batch_of(folder, out), workers=settings)
    key = signing_key(tmp_path / "key.pem")
    outcome = run_batch(batch, hire_thread, key, stopping=stopping, show=show)
    assert (outcome.is_done, outcome.manifest) == (False, None)
    assert outcome.tally == Tally(3, 1, 0, 0, 0)
    assert max(tally.num_held for tally in shown) == 2
    assert not (out / "manifest.json").exists()
    for name in ("001.json", "002.json"):
        (folder / name).write_text(json.dumps({"seed": 1, "seconds": 0, "how": "plain"}))
    done = run_here(folder, out, is_resumed=True)
    assert isinstance(done, Outcome)
    assert done.manifest is not None
    assert [case["attempts"] for case in done.manifest["cases"]] == [1, 2, 2]
