"""Sources and datasets on a hub: what is fetched, and what each refusal of the hub means for the user."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness.errors import UserError
from harness.model.hub import dataset_refusal
from harness.model.sources import bytes_to_fetch, locate
from harness.quantize.rows import open_samples
from harness.resolve import dataset_text
from harness.suite.texts import DatasetSamples, DatasetText
from tests.hub import COMMIT, Hub, Repository, hub

ROWS = {"README.md": b"card", "test.jsonl": b'{"text": "a"}\n{"text": "b"}\n'}
FILES = {"config.json": b"{}", "model.safetensors": b"x" * 3000, "pytorch_model.bin": b"pickled", "README.md": b"card"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine with public and gated models and datasets, and empty caches."""
    with hub("hf_of_nobody") as running:
        running.repositories["me/model"] = Repository(private=False, files=dict(FILES))
        running.repositories["me/gated"] = Repository(private=False, gated=True, files=dict(FILES))
        running.repositories["datasets/me/rows"] = Repository(private=False, files=dict(ROWS))
        running.repositories["datasets/me/gated"] = Repository(private=False, gated=True, files=dict(ROWS))
        running.repositories["datasets/me/private"] = Repository(private=True, files=dict(ROWS))
        running.repositories["datasets/me/broken"] = Repository(private=False, files={"test.jsonl": b'{"text": "a"'})
        running.repositories["datasets/me/empty"] = Repository(private=False, files={"README.md": b"card"})
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", running.url)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between one try and the next
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


# -- Datasets


def text_of(name: str, revision: str | None = None, split: str = "test") -> str:
    """A dataset as a text that is scored."""
    return dataset_text(DatasetText(name, split=split, revision=revision))


def samples_of(name: str, revision: str | None = None, split: str = "test") -> str:
    """A dataset as samples that calibrate."""
    source = DatasetSamples(dataset=name, split=split, revision=revision, samples=1, max_tokens=9, column="text")
    rows = open_samples(source, Path(), {}).rows
    assert rows is not None
    return "".join(row["text"] for row in rows)


Load = Callable[..., str]
both = pytest.mark.parametrize("load", [text_of, samples_of])


@both
def test_a_dataset_is_fetched(server: Hub, load: Load) -> None:
    assert load("me/rows") == "ab"


@both
def test_a_gated_dataset_is_told_with_its_page(server: Hub, load: Load) -> None:
    with pytest.raises(UserError, match="dataset me/gated is gated, and no token is set") as refused:
        load("me/gated")
    assert f"{server.url}/datasets/me/gated" in refused.value.remedy and "HF_TOKEN" in refused.value.remedy


@both
def test_a_gate_of_a_dataset_that_the_token_does_not_open_is_told_so(
    server: Hub, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    with pytest.raises(UserError, match="the account of this token has not been let in"):
        load("me/gated")


@both
@pytest.mark.parametrize("name", ["me/rwos", "me/private", "rows", "me/--rows"])
def test_a_dataset_that_the_hub_does_not_show_is_no_matter_of_the_network(server: Hub, load: Load, name: str) -> None:
    with pytest.raises(UserError, match=f"The hub has no dataset {name}") as refused:
        load(name)
    assert "Check the name" in refused.value.remedy and "HF_TOKEN" in refused.value.remedy


def test_a_token_that_the_hub_refuses_for_a_dataset_is_told(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    with pytest.raises(UserError, match="dataset me/private, or refuses the token"):
        text_of("me/private")


@both
def test_a_wrong_revision_of_a_dataset_is_named(server: Hub, load: Load) -> None:
    with pytest.raises(UserError, match="The dataset me/rows has no revision 'v9'"):
        load("me/rows", "v9")


@both
def test_without_a_network_it_is_said_how_a_dataset_gets_into_the_cache(server: Hub, load: Load) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be reached for me/rows") as refused:
        load("me/rows", "v1")
    assert "Check the network" in refused.value.remedy
    assert "datasets.load_dataset('me/rows', revision='v1')" in refused.value.remedy


@both
@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_offline_is_told_as_the_switch_that_is_set(
    server: Hub, load: Load, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # as the library sets it for either
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=f"^{switch} is set, and the hub's cache lacks the dataset me/rows") as refused:
        load("me/rows")
    assert "datasets.load_dataset('me/rows')" in refused.value.remedy
    assert (refusal := dataset_refusal("me/rows", None)) is not None and switch in refusal.problem


@both
def test_a_disk_that_fills_while_a_dataset_is_fetched_is_told(
    server: Hub, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match="The disk was full before me/rows was fetched"):
        load("me/rows")


@pytest.mark.parametrize(("what", "told"), [("die", "cannot be reached for me/rows"), (503, "error 503 for me/rows")])
def test_a_dataset_that_breaks_off_is_a_matter_of_the_hub(server: Hub, what: str | int, told: str) -> None:
    """It still answers for the dataset when it is asked again."""
    server.trouble["test.jsonl"] = what
    with pytest.raises(UserError, match=told):
        text_of("me/rows")


@both
@pytest.mark.parametrize(
    ("name", "split", "told"),
    [
        ("me/rows", "nope", 'Unknown split "nope"'),
        ("me/broken", "test", "An error occurred while generating"),
        ("me/empty", "test", ".*doesn't contain any data files"),
    ],
)
def test_what_is_wrong_with_a_dataset_itself_is_not_laid_on_the_hub(
    server: Hub, load: Load, name: str, split: str, told: str
) -> None:
    with pytest.raises(UserError, match=rf"The dataset {name} \(default, {split}\) cannot be loaded: {told}"):
        load(name, split=split)


def test_a_split_that_the_cache_lacks_is_not_laid_on_the_network(server: Hub) -> None:
    assert text_of("me/rows") == "ab"
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be loaded: Unknown split"):
        text_of("me/rows", split="nope")
