"""One head for the tests of this folder."""

from __future__ import annotations

import pytest

from spo.preference.taste.fit import fit_taste
from tests.vote_worlds import QUICK, vote_set


@pytest.fixture(scope="session")
def fitted():
    return fit_taste(vote_set(120), QUICK, name="mine")
