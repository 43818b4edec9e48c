"""What reForge changes around each sampling, held while its model is borrowed; with stand-ins for its modules."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from spo.webui.reforge import borrowing


class Sampling:
    def __init__(self):
        self.sigmas = torch.tensor([1.0, 2.0])

    def set_sigmas(self, sigmas):
        self.sigmas = sigmas


@pytest.fixture
def modules(monkeypatch):
    def override(model):
        model.alphas_cumprod = model.alphas_cumprod_original / 2

    package = ModuleType("modules")
    package.processing = SimpleNamespace(rescale_zero_terminal_snr_sigmas=lambda sigmas: 3 * sigmas)
    package.sd_models = SimpleNamespace(apply_alpha_schedule_override=override)
    package.shared = SimpleNamespace(opts=SimpleNamespace(sd_noise_schedule="Default"))
    monkeypatch.setitem(sys.modules, "modules", package)
    return package


def model_of(ztsnr):
    unet = SimpleNamespace(model=SimpleNamespace(model_sampling=Sampling()))
    return SimpleNamespace(
        ztsnr=ztsnr, alphas_cumprod=torch.tensor([0.5, 0.25]), forge_objects=SimpleNamespace(unet=unet)
    )


@pytest.mark.parametrize("by", ["the file", "the settings"])
def test_zero_terminal_snr_holds_all_the_time_and_is_put_in_once(modules, by):
    model = model_of(by == "the file")
    if by == "the settings":
        modules.shared.opts.sd_noise_schedule = "Zero Terminal SNR"
    sampling = model.forge_objects.unet.model.model_sampling
    rescale = modules.processing.rescale_zero_terminal_snr_sigmas
    override = modules.sd_models.apply_alpha_schedule_override
    with pytest.raises(KeyError), borrowing._schedule_in_force(model):
        assert sampling.sigmas.tolist() == [3.0, 6.0]
        assert model.alphas_cumprod.tolist() == [0.25, 0.125]
        sampling.set_sigmas(modules.processing.rescale_zero_terminal_snr_sigmas(sampling.sigmas))  # as it samples
        modules.sd_models.apply_alpha_schedule_override(model, None, force_apply=False)
        assert sampling.sigmas.tolist() == [3.0, 6.0]
        assert model.alphas_cumprod.tolist() == [0.25, 0.125]
        raise KeyError
    assert sampling.sigmas.tolist() == [1.0, 2.0]
    assert model.alphas_cumprod.tolist() == [0.5, 0.25]
    assert modules.processing.rescale_zero_terminal_snr_sigmas is rescale
    assert modules.sd_models.apply_alpha_schedule_override is override


def test_other_schedules_are_left_alone(modules):
    model = model_of(False)
    with borrowing._schedule_in_force(model):
        assert model.forge_objects.unet.model.model_sampling.sigmas.tolist() == [1.0, 2.0]
        assert not hasattr(model, "alphas_cumprod_original")


def test_the_prompt_history_is_a_file_where_there_is_no_flag_for_it(modules, tmp_path):
    """Forge classic's."""
    modules.shared.cmd_opts = SimpleNamespace()
    modules.paths = SimpleNamespace(data_path=str(tmp_path))
    file = tmp_path / "params.txt"
    with borrowing._without_prompt_history():
        file.write_text("ours")
    assert not file.exists()
    file.write_text("the user's")
    with borrowing._without_prompt_history():
        file.write_text("ours")
    assert file.read_text() == "the user's"
