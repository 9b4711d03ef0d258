"""Which environment a measuring session gets: of the arguments, the suite and the machine (`noxfile.py`)."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import noxfile
from noxfile import Measuring, measuring_environment

BASE = Measuring("measure", noxfile.CONSTRAINTS)


def pins(path: Path) -> dict[str, Version]:
    """The packages of a constraints file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


def requirements(*extras: str) -> list[Requirement]:
    """What the package needs with these extras, of its `pyproject.toml`."""
    project = noxfile.tomllib.loads((noxfile.ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *optional)]


@pytest.mark.parametrize("arguments", [[], ["--engine", "vllm"], ["--engine=torch"], ["--suite", "no.toml"]])
def test_without_a_gpu_every_session_shares_the_plain_environment(arguments: list[str]) -> None:
    assert measuring_environment(arguments, has_gpu=False) == BASE


@pytest.mark.parametrize("arguments", [["--engine", "vllm"], ["--engine=vllm", "--limit", "2"]])
@pytest.mark.parametrize("release", noxfile.VLLM_RELEASES)
def test_on_a_gpu_the_engine_that_is_named_brings_vllm(arguments: list[str], release: str) -> None:
    chosen = measuring_environment(arguments, has_gpu=True, release=release)
    assert chosen.extras == ("fla", "vllm")
    assert chosen.constraints.name == f"constraints-vllm-{release}.txt"


def test_on_a_gpu_a_suite_of_vllm_brings_it(tmp_path: Path) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text('[engine]\nname = "vllm"\n')
    assert "vllm" in measuring_environment(["--suite", str(suite)], has_gpu=True).extras
    assert measuring_environment(["--suite", str(suite), "--engine", "torch"], has_gpu=True).extras == ("fla",)


@pytest.mark.parametrize("text", ["", "engine = 3", "[engine]\nname = 4", "]["])
def test_a_suite_that_names_no_engine_gets_the_kernels_of_torch(tmp_path: Path, text: str) -> None:
    suite = tmp_path / "mine.toml"
    suite.write_text(text)
    assert measuring_environment([f"--suite={suite}"], has_gpu=True).extras == ("fla",)


def test_each_release_of_vllm_has_constraints_that_the_package_allows() -> None:
    for release in noxfile.VLLM_RELEASES:
        known = pins(noxfile.vllm_constraints(release))
        assert f"{known['vllm']}".startswith(f"{release}.")
        for needed in requirements("vllm", "fla"):
            assert known[needed.name.lower().replace("_", "-")] in needed.specifier, needed


def test_the_plain_constraints_are_what_the_package_allows() -> None:
    known = {name.lower().replace("_", "-"): version for name, version in pins(noxfile.CONSTRAINTS).items()}
    for needed in requirements():
        assert known[needed.name.lower().replace("_", "-")] in needed.specifier, needed


def test_the_container_installs_the_newest_release_by_its_constraints() -> None:
    text = (noxfile.ROOT / "Containerfile").read_text()
    release = noxfile.VLLM_RELEASES[-1]
    assert re.search(rf"^FROM \S*vllm/vllm-openai:v{re.escape(release)}\.\d+", text, re.MULTILINE)
    assert noxfile.vllm_constraints(release).name in text
