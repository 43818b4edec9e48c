"""Names and hashes of the published models, and how other modules speak of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from spo.config import NATIVE_SIZE_PX
from spo.preference.official import OFFICIAL_FILES, OFFICIAL_REPOSITORY, official_architecture, where_official


def test_one_model_an_architecture_with_a_whole_hash():
    assert set(OFFICIAL_FILES) == set(NATIVE_SIZE_PX)
    hashes = [file.sha256 for file in OFFICIAL_FILES.values()]
    assert len(set(hashes)) == len(hashes)
    assert all(len(bytes.fromhex(sha256)) == 32 and sha256 == sha256.lower() for sha256 in hashes)


@pytest.mark.parametrize("architecture", list(OFFICIAL_FILES))
def test_where_says_the_one_that_suits(architecture):
    text = where_official(architecture)
    assert OFFICIAL_FILES[architecture].name in text and text.endswith(f"huggingface.co/{OFFICIAL_REPOSITORY}")
    assert [file.name in text for file in OFFICIAL_FILES.values()].count(True) == 1


def test_where_says_all_when_the_architecture_is_another():
    assert all(file.name in where_official("") for file in OFFICIAL_FILES.values())


def test_a_file_is_known_by_its_name_alone():
    name = OFFICIAL_FILES["sdxl"].name
    assert official_architecture(Path("models") / "SPO" / name) == "sdxl"
    assert official_architecture(Path(name) / "other.bin") is None
    assert official_architecture(Path(name.replace(".bin", ".half.safetensors"))) is None
