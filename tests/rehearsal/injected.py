"""`harness` on a machine that is worse than this one.

    python -m tests.rehearsal.injected '{"vllm": null}' ppl --suite FILE

The first argument is JSON: fields of `harness.doctor.box.Box` with other values, and `free_disk`, a number of bytes.
"""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

from harness.cli import main
from harness.doctor import box


def inject(free_disk: int | None = None, gpus: list[list[object]] | None = None, **fields: object) -> None:
    """Makes this machine say so of itself. A GPU is a list of the fields of `Gpu`."""
    found = box.this_box()
    if gpus is not None:
        fields["gpus"] = tuple(box.Gpu(*gpu[:-1], tuple(gpu[-1])) for gpu in gpus)  # type: ignore[arg-type]
    box.this_box = lambda: replace(found, **fields)  # type: ignore[arg-type]
    if free_disk is not None:
        shutil.disk_usage = lambda _: SimpleNamespace(free=free_disk)  # type: ignore[assignment]


if __name__ == "__main__":
    inject(**json.loads(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
