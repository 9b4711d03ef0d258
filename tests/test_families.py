"""Families: nothing outside of their files knows a tensor's name, and what CONTRIBUTING says makes another one."""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import harness
from harness.audit.verify import verify
from harness.demo.synthesize import synthesize
from harness.errors import UserError
from harness.model import families
from harness.model.checkpoint import open_checkpoint
from harness.model.families import FAMILIES, qwen3_next
from harness.model.family import Layout, ModelConfig, Tensors
from harness.quantize.build import build
from harness.quantize.recipes import RECIPES
from harness.resolve import plan_source
from tests.artifacts import quiet
from tests.qwen3_next import config_json

ROOT = Path(harness.__file__).parent
PARTS_OF_NAMES = (
    *("experts.", ".experts", "shared_expert", "mtp.", "linear_attn", "self_attn", "_proj", "in_proj", "lm_head"),
    *(
        "embed_tokens",
        "visual.",
        ".visual",
        "language_model.",
        "model.layers",
        "layernorm",
        "conv1d",
        "A_log",
        "dt_bias",
    ),
)


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """Every string that stands alone: docstrings, and those under a constant."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def names_in(tree: ast.AST) -> Iterator[str]:
    """The strings of a module that hold a part of a tensor's name; sentences, which have spaces, tell the user."""
    told = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(text := node.value, str) and node not in told:
            yield from (f"line {node.lineno}: {text!r}" for part in PARTS_OF_NAMES if part in text and " " not in text)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT / "model" / "families"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_module_outside_of_the_families_holds_a_part_of_a_tensors_name(path: Path) -> None:
    assert list(names_in(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        'name.startswith("mtp.")',
        'f"{prefix}mlp.experts.{n}"',
        'x = ("q_proj", "k_proj")',
        'f"{parent}.lm_head"',
    ],
)
def test_the_program_finds_names_however_they_are_written(line: str) -> None:
    assert list(names_in(ast.parse(f'def f():\n    """Of `mtp.` tensors."""\n    {line}')))
    assert not list(names_in(ast.parse('raise ValueError("it has no lm_head at all")')))


def test_roles_of_one_name_have_the_same_properties_in_all_families() -> None:
    """Records know roles by their names alone."""
    for family in FAMILIES:
        for other in FAMILIES:
            for role in family.roles:
                for one in other.roles:
                    if role.name == one.name:
                        assert (role.part, role.block) == (one.part, one.block)


# -- Adding a family: a file with a `Family`, and its name in `FAMILIES` ------------------------------------------


def renamed(name: str) -> str:
    """Another family's name of a tensor, or its pattern of one."""
    for old, new in (
        ("linear_attn", "delta"),
        ("self_attn", "full"),
        ("shared_expert", "common"),
    ):
        name = name.replace(old, new)
    return name


def renamed_tensors(config: ModelConfig, layout: Layout, with_mtp: bool) -> Tensors:
    for name, shape in qwen3_next.FAMILY.tensors(config, layout, with_mtp):
        yield renamed(name), shape


NEW = replace(
    qwen3_next.FAMILY,
    name="new",
    modeling={"NewForCausalLM": next(iter(qwen3_next.FAMILY.modeling.values()))},
    published=replace(qwen3_next.FAMILY.published, text_prefix="backbone."),
    roles=tuple(
        replace(role, pattern=renamed(role.pattern), target=role.target and renamed(role.target))
        for role in qwen3_next.FAMILY.roles
    ),
    tensors=renamed_tensors,
    read_config=lambda config, where: replace(qwen3_next.FAMILY.read_config(config, where), family=NEW),
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a family that is in no file of the package."""
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, NEW))
    config = config_json() | {"architectures": ["NewForCausalLM"]}
    synthesize(config, tmp_path / "source", num_layers=3, vocab_size=64, seed=0, progress=quiet)
    return tmp_path / "source"


def test_a_family_in_the_registry_is_planned_built_and_verified(source: Path, tmp_path: Path) -> None:
    plan = plan_source(str(source), RECIPES["w4a4-deltanet"])[1]
    assert {count.role: count.format for count in plan.counts}["linear_attn.in_proj_qkvz"] == "NVFP4"
    made = build(source, RECIPES["rtn-a16"], tmp_path / "built", quiet)
    quantized = {count.role for count in made.counts if count.format != "kept"}
    assert {"mlp.experts.gate_up_proj", "mlp.shared_expert.up_proj", "mlp.down_proj"} <= quantized
    names = open_checkpoint(made.folder).tensors
    assert "backbone.layers.0.mlp.common.up_proj.weight_packed" in names
    for against in (None, source):
        assert verify(made.folder, against, quiet).findings == ()


def test_without_the_registry_it_is_refused(tmp_path: Path) -> None:
    config = config_json() | {"architectures": ["NewForCausalLM"]}
    with pytest.raises(UserError, match="'NewForCausalLM', which this harness does not know"):
        families.parse_config(config, "here")
