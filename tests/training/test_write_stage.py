"""A run's LoRA files: its own are replaced, and told from another's."""

from __future__ import annotations

import pytest

from spo.errors import SpoError
from spo.lora.adapter import configured_adapter
from spo.runs.layout import RunFiles
from spo.training.write_stage import stages_of_spo, write_stage
from tests.tiny_host import TinyHost, small


def learnt(host, config):
    """An adapter that changes something."""
    adapter = configured_adapter(host.network, config, {})
    for parameter in adapter.parameters():
        parameter.data.fill_(0.1)
    return adapter


def test_a_run_replaces_its_own_file_and_no_other(tmp_path):
    config = small(tmp_path)
    host, files = TinyHost(config), RunFiles.of(config.run.output)
    adapter = learnt(host, config)
    mine, other = ({"run_id": name, "started_at": 0.0} for name in ("mine", "other"))
    for step in (1, 2):
        write_stage(files.output, adapter, host, config, step, mine)
    with pytest.raises(SpoError, match="exists already"):
        write_stage(files.output, adapter, host, config, 3, other)


def test_stages_of_a_run_are_told_from_files_of_others(tmp_path):
    config = small(tmp_path)
    host, files = TinyHost(config), RunFiles.of(config.run.output)
    files.stage(1).write_bytes(b"not a LoRA of ours")
    write_stage(
        files.stage(2),
        learnt(host, config),
        host,
        config,
        2,
        {"run_id": "a", "started_at": 0.0},
    )
    assert stages_of_spo(files) == [files.stage(2)]
