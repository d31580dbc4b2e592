"""Generated cases (``scan``) and settings for tests of outputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import nan
from pathlib import Path

import numpy as np
import pytest

from apps.imaging.outputs.settings import OutputSettings
from apps.imaging.outputs.write import write_case
from tests.apps.imaging.outputs.scan import FORMS, KEY, Sample


@pytest.fixture
def plain() -> Sample:
    """Equal steps, no tilt, nothing filled in."""
    return FORMS["plain"]()


@pytest.fixture
def tilted() -> Sample:
    """A gantry tilted by 18.5 degrees."""
    return FORMS["tilted"]()


@pytest.fixture
def filled() -> Sample:
    """Slices 9 and 10 were not acquired."""
    return FORMS["filled"]()


@pytest.fixture
def uneven() -> Sample:
    """Nine steps of 4 mm, then ten of 7 mm."""
    return FORMS["uneven"]()


@pytest.fixture(params=list(FORMS))
def any_form(request: pytest.FixtureRequest) -> Sample:
    """Each of the forms in turn."""
    return FORMS[request.param]()


@dataclass(frozen=True)
class Written:
    """A case with its files."""

    sample: Sample
    directory: Path
    outputs: Mapping[str, str]


@pytest.fixture(scope="session")
def write_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Writes a form with ``settings``, once for all tests, of which none changes it."""

    @cache
    def write(form: str) -> Written:
        sample, directory = FORMS[form](), tmp_path_factory.mktemp(form)
        outputs = write_case(sample.case, sample.findings, directory, OutputSettings(uid_key=KEY))
        return Written(sample, directory, outputs)

    return write


@pytest.fixture
def written_plain(write_once: Callable[[str], Written]) -> Written:
    """The plain form."""
    return write_once("plain")


@pytest.fixture
def written_filled(write_once: Callable[[str], Written]) -> Written:
    """The form with slices that were not acquired."""
    return write_once("filled")


@pytest.fixture(params=list(FORMS))
def any_written(request: pytest.FixtureRequest, write_once: Callable[[str], Written]) -> Written:
    """Each of the forms in turn."""
    return write_once(request.param)


@pytest.fixture
def settings() -> OutputSettings:
    """De-identified, everything written."""
    return OutputSettings(uid_key=KEY)


@pytest.fixture
def without_organs(plain: Sample) -> Sample:
    """Nothing was found."""
    organs = tuple(
        replace(organ, volume_ml=0.0, mean_hu=nan, sd_hu=nan, box=None)
        for organ in plain.findings.organs
    )
    labels = np.zeros_like(plain.findings.labels)
    return replace(plain, findings=replace(plain.findings, labels=labels, organs=organs))


@pytest.fixture
def other_findings(plain: Sample) -> Sample:
    """The same slices, of which the model said something else."""
    organs = (replace(plain.findings.organs[0], volume_ml=1.25), *plain.findings.organs[1:])
    return replace(plain, findings=replace(plain.findings, organs=organs))
