"""One head for the tests of this folder."""

from __future__ import annotations

import pytest

from spo.preference.taste.fit import fit_taste
from tests.vote_worlds import QUICK, vote_set, vote_set_by_prompt


@pytest.fixture(scope="session")
def fitted():
    return fit_taste(vote_set(120), QUICK, name="mine")


@pytest.fixture(scope="session")
def reading():
    """A fit to votes whose rule flips with the prompt."""
    return fit_taste(vote_set_by_prompt(160), QUICK, name="by prompt")
