"""The embedded models: small, trained, in the exact layout of the published checkpoints.

`checkpoint_path("dense")` is a folder like any downloaded one, so everything runs offline. `corpus` makes the text
that the models were trained on and are measured on. The program that trained them is `studies.demo_model`.
"""

from __future__ import annotations

from pathlib import Path

from harness.errors import UserError, did_you_mean

SUITE = Path(__file__).parent / "demo.toml"
"""The suite of the embedded models; `suites/demo.toml` of the repository is this file."""


def checkpoint_path(name: str = "dense") -> Path:
    """The folder of an embedded checkpoint, `dense` or `moe`; `UserError` for another name."""
    root = Path(__file__).parent
    available = sorted(config.parent.name for config in root.glob("*/config.json"))
    if name not in available:
        raise UserError(f"There is no embedded model '{name}'.", did_you_mean(name, available))
    return root / name


def task_file(name: str) -> Path:
    """The lm-eval file of an embedded task, such as `recall`; `UserError` for another name."""
    folder = Path(__file__).parent / "tasks"
    available = sorted(file.stem.removeprefix("demo_") for file in folder.glob("demo_*.yaml"))
    if name not in available:
        raise UserError(f"There is no embedded task '{name}'.", did_you_mean(name, available))
    return folder / f"demo_{name}.yaml"
