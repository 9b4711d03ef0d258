"""Sources on a hub: what is fetched, and what each refusal of the hub means for the user."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness.errors import UserError
from harness.model.sources import bytes_to_fetch, locate
from tests.hub import COMMIT, Hub, Repository, hub

FILES = {"config.json": b"{}", "model.safetensors": b"x" * 3000, "pytorch_model.bin": b"pickled", "README.md": b"card"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine with one public model, and an empty cache."""
    with hub("hf_of_nobody") as running:
        running.repositories["me/model"] = Repository(private=False, files=dict(FILES))
        running.repositories["me/gated"] = Repository(private=False, gated=True, files=dict(FILES))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def test_a_model_is_fetched_without_its_pickles_and_not_a_second_time(server: Hub) -> None:
    assert bytes_to_fetch("me/model") == 3002
    folder = locate("me/model")
    assert folder.name == COMMIT
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert bytes_to_fetch("me/model") == 0
    fetched = [request for request in server.requests if request.startswith("GET /me/model/resolve")]
    locate("me/model")
    assert [request for request in server.requests if request.startswith("GET /me/model/resolve")] == fetched


def test_the_configuration_alone_can_be_fetched(server: Hub) -> None:
    assert [path.name for path in locate("me/model", config_only=True).iterdir()] == ["config.json"]


def test_a_gate_is_told_with_its_page(server: Hub) -> None:
    with pytest.raises(UserError, match="model me/gated is gated, and no token is set") as refused:
        locate("me/gated")
    assert f"{server.url}/me/gated" in refused.value.remedy and "HF_TOKEN" in refused.value.remedy


def test_a_gate_that_the_token_does_not_open_is_told_so(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    with pytest.raises(UserError, match="the account of this token has not been let in"):
        locate("me/gated")


def test_a_wrong_name_is_no_matter_of_the_network(server: Hub) -> None:
    with pytest.raises(UserError, match="The hub has no model me/modle") as refused:
        locate("me/modle")
    assert "Check the name" in refused.value.remedy and "HF_TOKEN" in refused.value.remedy


def test_a_wrong_revision_is_named(server: Hub) -> None:
    with pytest.raises(UserError, match="The model me/model has no revision 'v9'"):
        locate("me/model", "v9")


@pytest.mark.parametrize("status", [500, 503])
def test_a_hub_that_is_not_well_is_told_with_its_status(
    server: Hub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http._DEFAULT_RETRY_ON_STATUS_CODES", ())
    server.trouble["/revision/main"] = status
    with pytest.raises(UserError, match=f"error {status}"):
        locate("me/model")


def test_a_hub_that_is_not_there_is_a_matter_of_the_network(server: Hub) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be reached for me/model") as refused:
        locate("me/model")
    assert "network" in refused.value.remedy


def test_what_is_in_the_cache_needs_no_network(server: Hub) -> None:
    folder = locate("me/model")
    server.shutdown()
    server.server_close()
    assert locate("me/model") == folder
    assert bytes_to_fetch("me/model") == 0


def test_offline_the_whole_model_counts_and_not_its_configuration(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    locate("me/model", config_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the hub's cache lacks the model me/model"):
        bytes_to_fetch("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = locate("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bytes_to_fetch("me/model") == 0 and locate("me/model") == folder


def test_offline_is_told_as_a_switch(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and the hub's cache lacks the model me/model"):
        locate("me/model")


def test_a_disk_that_is_too_small_is_found_before_the_download(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"me/model takes 0\.0 GB to download") as refused:
        locate("me/model")
    assert "HF_HOME" in refused.value.remedy
    assert not [request for request in server.requests if request.startswith("GET /me/model/resolve")]


def test_a_download_that_was_cut_continues(server: Hub) -> None:
    server.cut = 1000
    with pytest.raises(UserError, match="cannot be reached"):
        locate("me/model")
    server.cut = None
    folder = locate("me/model")
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
