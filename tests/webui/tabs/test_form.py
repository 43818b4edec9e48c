"""The form is made of the configuration: a setting that is added there is in the tab, the API and the command line."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")
fastapi = pytest.importorskip("fastapi")
testclient = pytest.importorskip("fastapi.testclient", exc_type=ImportError)

from spo import config  # noqa: E402
from spo.cli import main  # noqa: E402
from spo.cli.settings_flags import given_values  # noqa: E402
from spo.presets import CARDS, NAMED, preset  # noqa: E402
from spo.webui import folders, seam  # noqa: E402
from spo.webui.api import bodies, routes  # noqa: E402
from spo.webui.jobs import job, training  # noqa: E402
from spo.webui.tabs import form  # noqa: E402
from spo.webui.tabs import train as train_tab  # noqa: E402
from tests.webui import stand_in  # noqa: E402

no_webui = stand_in.webui


@pytest.fixture
def flavour(monkeypatch):
    """One more setting, of the section "run"."""
    setting = config._setting("mild", "how it tastes", "mild", "hot")
    longer = dataclasses.make_dataclass(
        "RunConfig", [("flavour", str, setting)], bases=(config.RunConfig,), frozen=True
    )
    monkeypatch.setattr(config, "RunConfig", longer)
    config.settings.cache_clear()
    yield
    config.settings.cache_clear()


def test_a_setting_is_added_in_one_file(flavour):
    import gradio

    assert config.build_config({"flavour": "hot"}).flat()["flavour"] == "hot"
    values = dict(zip(form.names(), form.preset_values("quick", "sdxl"), strict=True))
    with gradio.Blocks():
        field = form.group_fields(form.groups()["Saving"], values)["flavour"]
    choices = [choice if isinstance(choice, str) else choice[0] for choice in field.choices]  # Gradio 4: with labels
    assert (choices, field.value, field.label) == (["mild", "hot"], "mild", "Flavour")
    assert form.read(form.field_values({"flavour": "hot"}))["flavour"] == "hot"
    assert bodies.settings_schema()["flavour"]["enum"] == ["mild", "hot"]
    assert main.parser().parse_args(["train", "--flavour", "hot"]).flavour == "hot"


# ---------------------------------------------------------------------------------------- tab, API and command line


@pytest.fixture
def asked_for(no_webui, monkeypatch):
    """`asked_for(interface, preset, architecture, **edits)` -> the configuration that training would begin with."""
    prepared = []
    monkeypatch.setattr(training, "_train", lambda job, ready, resume: prepared.append(ready.config))
    monkeypatch.setattr(train_tab, "plan_text", lambda request: "")
    # the loaded checkpoint is the demo's, which has a size of its own
    monkeypatch.setattr(folders, "usual_size_px", lambda architecture, file_name: config.NATIVE_SIZE_PX[architecture])
    app = fastapi.FastAPI()
    routes.add_routes(app)
    client = testclient.TestClient(app)
    numbers = iter(range(1000))

    def ask(interface, preset_name, architecture, **changes):
        no_webui.sd_models.model_data.sd_model.is_sdxl = architecture == "sdxl"
        no_webui.sd_models.model_data.sd_model.conditioner = SimpleNamespace(embedders=[FrozenCLIPEmbedder()])
        name, changes = f"run{next(numbers)}", {"preference": "demo", **changes}
        if interface == "tab":
            # filled while an SD1.5 checkpoint was loaded, whatever is loaded at Start
            filling = form.Filling(preset_name, NAMED[preset_name].architecture or "sd15")
            shown = dict(zip(form.names(), form.preset_values(filling.preset, filling.architecture), strict=True))
            fields = [changes.get(setting, value) for setting, value in shown.items()]
            answer = train_tab._start(filling.text(), name, "a fox", [], *fields)[0]
            assert "spo-failed" not in answer, answer
        elif interface == "API":
            body = {"name": name, "prompts": ["a fox"], "preset": preset_name, "settings": changes}
            assert client.post("/spo/v1/start", json=body).status_code == 200
        else:
            flags = [f"--{setting.replace('_', '-')}={value}" for setting, value in changes.items()]
            given = given_values(main.parser().parse_args(["train", "--preset", preset_name, *flags]))
            return config.build_config(given, architecture).flat()
        job._thread.join(10)
        return prepared.pop().flat()

    return ask


class FrozenCLIPEmbedder:
    pass


CHOICES = [
    (name, architecture)
    for name, preset in NAMED.items()
    for architecture in ("sd15", "sdxl")
    if preset.architecture in ("", architecture)
]


@pytest.mark.parametrize("changes", [{}, {"rank": 12, "learning_rate": 2e-5}])
@pytest.mark.parametrize(("name", "architecture"), CHOICES)
def test_tab_api_and_command_line_mean_the_same(asked_for, name, architecture, changes):
    configs = [asked_for(interface, name, architecture, **changes) for interface in ("tab", "API", "command line")]
    own = {*training.HOST_OWNED, "negative_prompt"}
    tab, api, command_line = ({key: value for key, value in one.items() if key not in own} for one in configs)
    assert tab == api == command_line
    assert {key: tab[key] for key in changes} == changes


def test_the_users_own_changes_stay_when_the_checkpoint_changes(no_webui):
    before, after = form.Filling("12gb", "sd15"), form.Filling("12gb", "sdxl", "xl.safetensors")
    fields = dict(zip(form.names(), form.preset_values("12gb", "sd15"), strict=True))
    assert fields["candidates"] == 4
    fields |= {"beta": 7.0, "negative_prompt": "bad", "steps": None}
    refilled = dict(zip(form.names(), form.refilled(list(fields.values()), before, after), strict=True))
    assert (refilled["candidates"], refilled["inner_steps"]) == (2, 3)
    fields["steps"] = 5
    refilled = dict(zip(form.names(), form.refilled(list(fields.values()), before, after), strict=True))
    assert (refilled["candidates"], refilled["beta"], refilled["steps"]) == (2, 7.0, 5)
    assert form.Filling.of(after.text()) == after
    chosen = form.refilled(list(fields.values()), before, form.Filling("quick", "sdxl"), ("negative_prompt",))
    chosen = dict(zip(form.names(), chosen, strict=True))
    assert (chosen["beta"], chosen["negative_prompt"], chosen["steps"]) == (10.0, "bad", 60)


@pytest.mark.parametrize("architecture", ["sd15", "sdxl"])
@pytest.mark.parametrize("card", CARDS)
def test_a_memory_choice_is_the_preset_for_that_card(asked_for, card, architecture):
    """The tab's two choices, "Paper" and a card, are what the API calls by the card's name."""
    paper, values = f"paper-{architecture}", preset(card).values
    shown = dict(zip(form.names(), form.preset_values(paper, architecture, card), strict=True))
    assert {name: shown[name] for name in values if name in shown} == {
        name: value for name, value in values.items() if name in shown
    }
    edits = form.edits(list(shown.values()), paper, architecture)
    assert set(edits) - {"preference"} <= set(values)
    tab = asked_for("tab", paper, architecture, **{name: edits[name] for name in values if name in edits})
    api = asked_for("API", card, architecture)
    own = {*training.HOST_OWNED, "negative_prompt"}
    assert {k: v for k, v in tab.items() if k not in own} == {k: v for k, v in api.items() if k not in own}


def test_every_setting_has_a_place_and_a_hint(no_webui):
    shown = [setting.name for members in form.groups().values() for setting in members]
    assert sorted(shown) == sorted({*form.names()} - {"preference", "steps"})
    assert all(form.hint(name)[0].isupper() or form.hint(name)[0] in ".0123456789" for name in shown)


def test_strength_is_the_learning_rate(no_webui):
    filling = form.Filling("paper-sdxl", "sdxl")
    assert form.learning_rate_of("Usual", filling) == 1e-5
    assert [form.strength_of(form.learning_rate_of(name, filling), filling) for name in form.STRENGTHS] == list(
        form.STRENGTHS
    )
    assert form.strength_of(1.7e-5, filling) is None


@pytest.mark.parametrize(
    ("gib", "usual"), [(None, ""), (6, "8gb"), (8, "8gb"), (12, "12gb"), (16, "12gb"), (23.6, "24gb"), (48, "")]
)
def test_the_memory_choice_follows_the_card(gib, usual):
    assert form.usual_memory(seam.webui.Card("a card", gib) if gib else None) == usual


def test_what_is_filled_in_is_read_back(no_webui):
    values = {"modules": ["attention", "feed-forward"], "sample_prompts": ["a fox, red", "a boat"], "start_from": ""}
    assert form.read(form.field_values(values)) == {**form.read(form.field_values({})), **values}
