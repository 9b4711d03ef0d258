"""The embedded models: small, trained, in the exact layout of the published checkpoints.

`checkpoint_path("dense")` is a folder like any downloaded one, so everything runs offline. `corpus` makes the text
that the models were trained on and are measured on. The program that trained them is `studies.demo_model`.
"""

from pathlib import Path

from harness.errors import UserError, did_you_mean

_HERE = Path(__file__).parent
SUITE = _HERE / "demo.toml"
"""The suite of the embedded models; `suites/demo.toml` of the repository is this file."""


def checkpoint_path(name: str = "dense") -> Path:
    """The folder of an embedded checkpoint, `dense` or `moe`; `UserError` for another name."""
    return _embedded("model", name, {file.parent.name: file.parent for file in _HERE.glob("*/config.json")})


def task_file(name: str) -> Path:
    """The lm-eval file of an embedded task, such as `recall`; `UserError` for another name."""
    files = (_HERE / "tasks").glob("demo_*.yaml")
    return _embedded("task", name, {file.stem.removeprefix("demo_"): file for file in files})


def _embedded(what: str, name: str, paths: dict[str, Path]) -> Path:
    if name not in paths:
        raise UserError(f"There is no embedded {what} '{name}'.", did_you_mean(name, sorted(paths)))
    return paths[name]
