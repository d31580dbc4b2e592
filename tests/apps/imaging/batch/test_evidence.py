"""A signed batch, altered in every way: each is found, and nothing else is."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from apps.imaging.batch.evidence import (
    Verification,
    default_key_path,
    fingerprint,
    public_key,
    publish,
    sample_of,
    signing_key,
    verify,
)
from apps.imaging.batch.layout import Layout
from apps.imaging.batch.manifest import canonical, read_manifest
from apps.imaging.batch.process import Application
from apps.imaging.batch.verification import BatchRerun, as_text
from apps.imaging.outputs.summary import CaseSummary
from apps.imaging.reading.source import Source
from cluster.client import Client
from cluster.errors import ConfigurationError
from tests.apps.imaging.batch.small_batch import (
    APPLICATION,
    hire_thread,
    make_input,
    process,
    run_here,
)


def no_rerun(case_ids: Sequence[str], _out: Path, /) -> Mapping[str, CaseSummary]:
    pytest.fail(f"nothing was to be run again, got {case_ids}")


def checked(out: Path) -> Verification:
    """Check signature and files alone."""
    return verify(Layout(out), num_sample=0, seed=0, rerun=no_rerun, work=out.parent / "work")


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a batch; not to be touched."""
    folder = tmp_path_factory.mktemp("signed")
    run_here(make_input(folder / "in", [{}, {}, {"how": "unreadable"}]), folder / "out")
    return folder / "out"


@pytest.fixture
def out(signed: Path, tmp_path: Path) -> Path:
    """The same, to be altered."""
    return Path(shutil.copytree(signed, tmp_path / "out"))


def a_file_of(out: Path, number: int = 0) -> Path:
    record = read_manifest(out / "manifest.json")["cases"][number]
    return out / str(record["outputs"]["values"])


def test_an_untouched_batch_passes(out: Path) -> None:
    found = checked(out)
    assert found.has_passed
    assert found.signer == fingerprint(public_key(out / "manifest.pub"))
    assert len(found.verdicts) == 3
    assert as_text(found).splitlines()[-1] == (
        f"passed: 3 cases, 0 of them run again; signed by {found.signer}"
    )


def test_it_can_be_copied_without_its_journal(out: Path) -> None:
    shutil.rmtree(out / "batch")
    assert checked(out).has_passed


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def resign(out: Path) -> None:
    """Sign an altered manifest with another key and put that beside it."""
    manifest = dict(read_manifest(out / "manifest.json")) | {"complete": False}
    publish(Layout(out), manifest, Ed25519PrivateKey.generate())


@pytest.mark.parametrize(
    "alter",
    [
        lambda out: flip(out / "manifest.json", 40),
        lambda out: flip(out / "manifest.json", -3),
        lambda out: flip(out / "manifest.sig", 10),
        lambda out: (out / "manifest.sig").unlink(),
        lambda out: (out / "manifest.sig").write_bytes(b""),
        lambda out: (out / "manifest.pub").unlink(),
        lambda out: (out / "manifest.pub").write_text("no key"),
        lambda out: (out / "manifest.json").write_text(
            json.dumps(json.loads((out / "manifest.json").read_text()), indent=1)
        ),
    ],
)
def test_an_altered_manifest_or_signature_is_found(
    alter: Callable[[Path], object], out: Path
) -> None:
    alter(out)
    found = checked(out)
    assert not found.has_passed
    assert len(found.problems) == 1
    assert found.problems[0].startswith("signature: ")
    assert found.verdicts == ()


def test_another_signer_is_found_by_who_trusts_the_first(signed: Path, out: Path) -> None:
    trusted = public_key(signed / "manifest.pub")
    resign(out)
    assert checked(out).has_passed  # the key beside it says no more than that
    found = verify(
        Layout(out), num_sample=0, seed=0, rerun=no_rerun, work=out.parent, trusted=trusted
    )
    assert not found.has_passed
    assert fingerprint(trusted) in found.problems[0]


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (lambda path: flip(path, 5), "was altered"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "was altered"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), "is missing"),
        (lambda path: path.with_name("more.bin").touch(), "is not in the manifest"),
    ],
)
def test_an_altered_output_is_found_at_its_case(
    alter: Callable[[Path], object], problem: str, out: Path
) -> None:
    alter(a_file_of(out, 1))
    found = checked(out)
    assert found.problems == ()
    bad = [verdict for verdict in found.verdicts if verdict.problems]
    assert [verdict.case_id for verdict in bad] == [found.verdicts[1].case_id]
    assert any(each.endswith(problem) for each in bad[0].problems)
    assert "FAILED" in as_text(found)


@pytest.mark.parametrize("name", ["index.html", "cases/stray.txt", "cases/nobody/x.txt"])
def test_what_is_altered_of_no_case_is_found(name: str, out: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("other")
    found = checked(out)
    assert not found.has_passed
    assert not any(verdict.problems for verdict in found.verdicts)
    assert [problem.split(":")[0] for problem in found.problems] == [name]


def test_the_signature_can_be_checked_by_openssl(out: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "manifest.pub", "-rawin"]
    command += ["-in", "manifest.json", "-sigfile", "manifest.sig"]
    subprocess.run(command, cwd=out, check=True, capture_output=True)
    flip(out / "manifest.json", 40)
    assert subprocess.run(command, cwd=out, check=False, capture_output=True).returncode != 0


def rerun_with(application: Application, out: Path, given: Path | None = None) -> BatchRerun:
    return BatchRerun(
        application, Layout(out), given, hire_thread, threading.Event(), lambda _: None
    )


def test_a_sample_that_comes_out_the_same_passes(signed: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    found = verify(
        Layout(signed), num_sample=2, seed=1, rerun=rerun_with(APPLICATION, signed), work=work
    )
    assert found.has_passed, as_text(found)
    again = [verdict.case_id for verdict in found.verdicts if verdict.is_rerun]
    assert sorted(again) == sample_of(sorted(each.case_id for each in found.verdicts), 2, 1)
    assert {path.name for path in (work / "cases").iterdir()} <= set(again)


async def process_otherwise(source: Source, directory: Path, client: Client) -> CaseSummary:
    summary = await process(source, directory, client)
    return replace(summary, num_slices=4) if source.label == "001.json" else summary


def test_a_case_that_comes_out_otherwise_fails_and_is_named(signed: Path, tmp_path: Path) -> None:
    application = replace(APPLICATION, process=process_otherwise)
    rerun = rerun_with(application, signed)
    found = verify(Layout(signed), num_sample=9, seed=0, rerun=rerun, work=tmp_path / "work")
    assert all(verdict.is_rerun for verdict in found.verdicts)
    assert [verdict.problems for verdict in found.verdicts] == [(), ("slices: 3, now 4",), ()]


def test_a_case_that_is_gone_from_the_input_fails(signed: Path, tmp_path: Path) -> None:
    less = Path(shutil.copytree(signed.parent / "in", tmp_path / "less"))
    (less / "000.json").unlink()
    rerun = rerun_with(APPLICATION, signed, less)
    found = verify(Layout(signed), num_sample=3, seed=0, rerun=rerun, work=tmp_path / "work")
    assert [bool(verdict.problems) for verdict in found.verdicts] == [True, False, False]


def test_without_a_journal_the_input_must_be_named(out: Path, tmp_path: Path) -> None:
    shutil.rmtree(out / "batch")
    with pytest.raises(ConfigurationError, match="say --input"):
        rerun_with(APPLICATION, out)(["x"], tmp_path / "work")


def test_the_sample_depends_on_the_seed_alone() -> None:
    cases = [f"{number:02d}" for number in range(40)]
    assert sample_of(cases, 5, 7) == sample_of(cases, 5, 7)
    assert sample_of(cases, 5, 7) != sample_of(cases, 5, 8)
    assert sample_of(cases, 99, 0) == cases


def test_a_key_is_made_for_its_owner_alone_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key.pem"
    before = os.umask(0)
    try:
        made = signing_key(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing_key(path).public_key() == made.public_key()
    data = canonical({"a": 1})
    made.public_key().verify(signing_key(path).sign(data), data)


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    signing_key(path)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="expected mode 600, got 644"):
        signing_key(path)


@pytest.mark.parametrize("text", ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_a_file_without_a_key_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="Ed25519 key in PEM"):
        signing_key(path)
    with pytest.raises(ConfigurationError, match="Ed25519 key in PEM"):
        public_key(path)


def test_the_key_lies_in_the_users_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert default_key_path() == Path("/somewhere/trimoe/imaging_signing_key.pem")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_key_path() == Path.home() / ".config/trimoe/imaging_signing_key.pem"
