"""Which pickles are read, and the half-precision twin of a published one."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from spo.checkpoint.hashes import file_sha256
from spo.errors import SpoError
from spo.preference.load import describe_preference, load
from spo.preference.official import OFFICIAL_FILES, OfficialFile
from spo.preference.pickles import convert, in_half, open_model_file
from tests.preference.clip.test_step_aware import (  # noqa: F401
    candidates_of,
    metadata,
    recorded,
    weights,
)

NAME = OFFICIAL_FILES["sd15"].name


@pytest.fixture
def old_torch(monkeypatch):
    monkeypatch.setattr("spo.checkpoint.tensor_file.FIRST_SAFE_TORCH", (99, 0))


@pytest.fixture
def published(tmp_path, weights, monkeypatch):  # noqa: F811
    """A tiny model under the published name, whose hash is taken for the published one's."""
    torch.save({**weights, "model.text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / NAME)
    official = {**OFFICIAL_FILES, "sd15": OfficialFile(NAME, file_sha256(tmp_path / NAME))}
    for place in ("official", "pickles"):
        monkeypatch.setattr(f"spo.preference.{place}.OFFICIAL_FILES", official)
    return tmp_path / NAME


def facts_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_an_old_torch_reads_no_pickle_but_the_published_ones(published, weights, tmp_path, old_torch):  # noqa: F811
    torch.save(weights, tmp_path / "mine.bin")
    for attempt in (load, describe_preference):
        with pytest.raises(SpoError, match=r"can be made to run code by one .* convert-preference .*mine\.bin"):
            attempt(tmp_path / "mine.bin")
    assert open_model_file(published).is_pickle
    info = describe_preference(published)
    assert (info.kind, info.architecture, info.size_bytes) == ("step-aware CLIP", "sd15", published.stat().st_size)


def test_another_file_under_the_published_name_is_not_trusted(published, weights, old_torch):  # noqa: F811
    torch.save({"model.logit_scale": torch.ones(())}, published)
    with pytest.raises(SpoError, match="can be made to run code"):
        load(published)
    with pytest.raises(SpoError, match="is not the published file of that name, or is damaged"):
        in_half(published)


def test_half_precision_reads_a_twin_that_is_written_once(published, weights):  # noqa: F811
    twin = in_half(published)
    assert twin.name == "sd-v1-5_step-aware_preference_model.half.safetensors"
    metadata, dtypes = facts_of(twin)  # noqa: F811
    assert metadata == {"source_sha256": file_sha256(published), "architecture": "sd15"}
    assert {name for name, dtype in dtypes.items() if dtype == "F32"} == {"model.logit_scale"}
    assert twin.stat().st_size < 0.51 * published.stat().st_size
    changed = twin.stat().st_mtime_ns
    assert in_half(published) == twin and twin.stat().st_mtime_ns == changed
    assert describe_preference(twin).architecture == "sd15"
    assert in_half(twin) == twin


def test_a_twin_of_another_file_is_written_anew(published, weights, tmp_path):  # noqa: F811
    torch.save(weights, tmp_path / "mine.bin")
    twin = in_half(published)
    convert(tmp_path / "mine.bin", twin, replace=True)
    assert facts_of(in_half(published))[0]["source_sha256"] == file_sha256(published)


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(published, monkeypatch):
    def read_only(*arguments, **settings):
        raise PermissionError("read-only")

    monkeypatch.setattr("spo.preference.pickles.convert", read_only)
    assert in_half(published) == published


def test_scores_from_the_twin_are_those_of_the_published_file(published, metadata, recorded):  # noqa: F811
    (published.parent / "config.json").write_text(metadata["clip_config"])
    pool = candidates_of(recorded["square.images"][None], 201)
    exact = load(published).score(pool, ["a"] * 4)
    half = load(published, precision="bfloat16").score(pool, ["a"] * 4)
    assert in_half(published).exists()
    assert float((exact - half).abs().max()) < 0.02 * float(exact.abs().max())
