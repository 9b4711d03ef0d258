"""Sizing against published settings, and command lines against the shells that read them."""

import inspect
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from hypothesis import example, given
from hypothesis import strategies as st

from harness import serve
from harness.cli import main, parser
from harness.errors import UserError
from harness.model.family import ModelConfig
from harness.quantize.plan import Plan
from harness.quantize.recipes import recipe_named
from harness.resolve import plan_source, serving_footprint
from harness.suite.names import is_hub_id

DATA = Path(__file__).parent / "data"
RTX_5090_GIB = 31.8  # of 32, as the driver reports it


def planned(model: str = "qwen3.5-9b", recipe: str = "w4a4") -> tuple[ModelConfig, Plan]:
    source, what = plan_source(str(DATA / f"{model}.json"), recipe_named(recipe))
    return source.config, what


@pytest.mark.parametrize(("utilization", "published"), [(0.95, 110_880), (0.8, 77_088)])
def test_the_sizes_of_a_published_card_come_out_within_five_percent(utilization: float, published: int) -> None:
    """9B in W4A4 on an RTX 5090 with 64 users. The card's vLLM, 0.18, let every token take a place in each of the four
    groups of layers that share a block, so what it calls a token is four of ours."""
    config, plan = planned()
    sizing = serve.size(serving_footprint(config, plan.counts), gpu_gib=RTX_5090_GIB, utilization=utilization)
    assert sizing.cache_bytes / (4 * sizing.kv_bytes_per_token) == pytest.approx(published, rel=0.05)


def test_the_sizing_is_arithmetic() -> None:
    config, plan = planned()
    sizing = serve.size(
        serving_footprint(config, plan.counts), gpu_gib=32, utilization=0.5, overhead_gb=1.0, users=3, images=False
    )
    vision = sum(count.output_bytes for count in plan.counts if count.role == "visual")
    assert sizing.gpu_bytes == 16 * 2**30
    assert sizing.weight_bytes == plan.output_bytes - vision
    assert sizing.cache_bytes == sizing.gpu_bytes - sizing.weight_bytes - 10**9
    assert sizing.kv_bytes_per_token == 8 * 2 * 4 * 256 * 2  # layers, keys and values, heads, width, bytes
    assert sizing.shared_tokens == (sizing.cache_bytes - 3 * sizing.state_bytes) // sizing.kv_bytes_per_token
    most = (sizing.cache_bytes - sizing.state_bytes) / sizing.kv_bytes_per_token
    assert most - 16 < sizing.max_model_len <= most


def test_no_sequence_is_longer_than_the_model_was_made_for() -> None:
    config, plan = planned()
    assert serve.size(serving_footprint(config, plan.counts), gpu_gib=96).max_model_len == 262_144


def test_gpus_that_share_layers_add_their_memory() -> None:
    config, plan = planned("qwen3.6-35b-a3b")
    with pytest.raises(UserError, match=r"leave no room for a sequence in .*90% of 1 × 24 GiB"):
        serve.size(serving_footprint(config, plan.counts), gpu_gib=24)
    both = serve.size(serving_footprint(config, plan.counts), gpu_gib=24, num_gpus=2)
    assert "--tensor-parallel-size" in serve.vllm_arguments(both, name="x", num_gpus=2)


AWKWARD = ["--served-model-name", "it's a $name", "--max-model-len", "16"]


def test_bash_reads_the_words_that_were_meant(tmp_path: Path) -> None:
    folder = tmp_path / "my 'model'"
    folder.mkdir()
    for line, expected in (
        (serve.vllm_line("my 'model'", AWKWARD), ["serve", "my 'model'", *AWKWARD]),
        (
            serve.docker_bash("my 'model'", AWKWARD),
            [
                *("run", "--rm", "--gpus", "all", "--ipc", "host", "-p", "127.0.0.1:8000:8000"),
                *("-v", f"{folder.resolve()}:/model:ro", serve.IMAGE, "/model", *AWKWARD),
            ],
        ),
    ):
        show = 'vllm() { printf \'%s\\n\' "$@"; }; docker() { vllm "$@"; }\n'
        done = subprocess.run(["bash", "-c", show + line], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.splitlines() == expected


def test_powershell_lines_go_on_after_a_backtick_and_quote_as_powershell_does() -> None:
    line = serve.docker_powershell("C:/it's here", AWKWARD)
    assert all(part.endswith(" `") for part in line.splitlines()[:-1])
    assert "--served-model-name 'it''s a $name'" in line
    assert "$(Resolve-Path 'C:/it''s here')" in line


def test_the_compose_file_is_yaml_that_says_the_same() -> None:
    (service,) = yaml.safe_load(serve.compose("./artifacts/x", AWKWARD))["services"].values()
    assert service["command"] == ["/model", *AWKWARD]
    assert service["volumes"] == ["./artifacts/x:/model:ro"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["driver"] == "nvidia"


def suite_of(tmp_path: Path, model: str) -> Path:
    shutil.copy(DATA / f"{model}.json", tmp_path / "config.json")
    suite = tmp_path / "suite.toml"
    suite.write_text(
        f'name = "card"\ntitle = "t"\n[source]\nlocation = "{tmp_path}/config.json"\n[variants.w4a4]\nrecipe = "w4a4"\n'
    )
    return suite


@given(st.text("aZ9_.-/é\n", max_size=12) | st.from_regex(r"[aZ9_.-]{1,99}/[aZ9_.-]{1,99}(\.git)?", fullmatch=True))
@example("datasets/x.git")
@example("a.git/x")
@example(f"{'a' * 96}/{'b' * 96}")
@example(f"{'a' * 96}/{'b' * 97}")
@example("json")
def test_a_hub_id_is_what_the_hubs_own_library_takes_with_an_owner(name: str) -> None:
    try:
        validate_repo_id(name)
        expected = "/" in name
    except HFValidationError:
        expected = False
    assert is_hub_id(name) == expected


def test_a_model_on_the_hub_is_named_and_its_downloads_are_kept(tmp_path: Path) -> None:
    line = serve.docker_bash("me/my-9b-NVFP4", AWKWARD)
    words = shlex.split(line.replace("\\\n", " "))
    assert words[words.index(serve.IMAGE) + 1] == "me/my-9b-NVFP4"
    assert "~/.cache/huggingface:/root/.cache/huggingface" in words and "/model" not in line
    assert '-v "$HOME/.cache/huggingface:/root/.cache/huggingface"' in serve.docker_powershell("me/x", AWKWARD)
    (service,) = yaml.safe_load(serve.compose("me/x", AWKWARD))["services"].values()
    assert service["command"][0] == "me/x"
    assert service["volumes"] == ["~/.cache/huggingface:/root/.cache/huggingface"]


def test_the_command_prints_everything_to_serve_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = str(suite_of(tmp_path, "qwen3.5-9b"))
    assert main(["serve-command", "--suite", suite, "--variant", "w4a4", "--gpu-memory", "32", "--users", "8"]) == 0
    out = capsys.readouterr().out
    for part in (
        "# vllm\n",
        "# docker, bash\n",
        "# docker, PowerShell\n",
        "# compose.yaml\n",
        "--reasoning-parser qwen3",
    ):
        assert part in out
    assert main(["serve-command", "--suite", suite, "--variant", "w4a4", "--gpu-memory", "32", "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    words = shlex.split(document["commands"]["vllm"].replace("\\\n", " "))
    assert words[:3] == ["vllm", "serve", "./artifacts/card/w4a4"]
    assert words[words.index("--max-model-len") + 1] == str(document["sizing"]["max_model_len"])


def test_the_options_help_names_the_defaults_that_sizing_has(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["serve-command", "--suite", "x", "--variant", "x", "--gpu-memory", "32"]
    options = parser(asked).parse_args(asked)
    defaults = {name: one.default for name, one in inspect.signature(serve.size).parameters.items()}
    assert (options.utilization, options.users) == (defaults["utilization"], defaults["users"])
    with pytest.raises(SystemExit):
        main([*asked, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert f"(default: {options.utilization:g})" in told and f"(default: {options.users})" in told
    assert f"(default: {serve.OVERHEAD_GB[True]:g}, without images {serve.OVERHEAD_GB[False]:g})" in told


def test_mtp_is_refused_where_the_source_shows_no_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = str(suite_of(tmp_path, "qwen3.5-9b"))
    asked = ["serve-command", "--suite", suite, "--variant", "w4a4", "--gpu-memory", "32", "--mtp", "1"]
    assert main(asked) == 2
    assert "no MTP head" in capsys.readouterr().err
