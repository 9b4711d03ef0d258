"""The text part of a model alone, under a class of its own, as fine-tunes of it are saved."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

TEXT = "model.language_model."


def text_only(prefix: str) -> Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]:
    """The text part under its own class, with its numbers at the top of the configuration."""

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        (whole,), text = config["architectures"], dict(config["text_config"])
        tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
        config.clear()
        config.update(tied | text | {"architectures": [whole.replace("ForConditionalGeneration", "ForCausalLM")]})
        return {name.replace(TEXT, prefix): one for name, one in tensors.items() if "visual" not in name}

    return change


def text_part(whole: Path, folder: Path, prefix: str) -> Path:
    """The text part of the checkpoint in `whole`, in one file."""
    config = json.loads((whole / "config.json").read_text())
    folder.mkdir()
    for path in whole.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and not any(word in path.name for word in ("processor", "index")):
            shutil.copy(path, folder)
    tensors = {name: one for shard in whole.glob("*.safetensors") for name, one in load_file(shard).items()}
    save_file(text_only(prefix)(tensors, config), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
