"""The suites of the published cards say what the cards say: counts, lengths, datasets, and which layers are quantized.

What a card states is written down here by hand, its patterns for names of modules as they stand in it.
"""

import re
from pathlib import Path

import pytest

import harness
from harness.measure.perplexity import get_protocol, windows
from harness.model.census import SourceTensor
from harness.quantize.plan import plan, quantized
from harness.quantize.recipes import recipe_named
from harness.suite.load import load
from harness.suite.schema import Counts, Suite
from harness.suite.texts import DatasetSamples
from tests.conftest import census, published_config

FOLDER = Path(harness.__file__).parent.parent / "suites"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
MODELS = {
    "qwen3.5-9b-heretic-a16": ("coder3101/Qwen3.5-9B-heretic", "qwen3.5-9b"),
    "qwen3.5-9b-w4a4": ("Qwen/Qwen3.5-9B", "qwen3.5-9b"),
    "qwen3.5-27b": ("Qwen/Qwen3.5-27B", "qwen3.5-27b"),
    "qwen3.6-35b-a3b-heretic-w4a4": ("tvall43/Qwen3.6-35B-A3B-heretic", "qwen3.6-35b-a3b"),
    "qwen3.6-35b-a3b-mixed": ("Qwen/Qwen3.6-35B-A3B", "qwen3.6-35b-a3b"),
}
"""By suite: the hub id of its source, and the published configuration of that architecture in tests/data."""
CALIBRATION = {
    "qwen3.5-9b-heretic-a16": [],
    "qwen3.5-9b-w4a4": [
        ("HuggingFaceH4/ultrachat_200k", 256, 8192),
        ("openai/gsm8k", 256, 8192),
        ("sahil2801/CodeAlpaca-20k", 256, 8192),
        ("CohereLabs/aya_dataset", 256, 8192),
    ],
    "qwen3.5-27b": [("HuggingFaceH4/ultrachat_200k", 256, 4096)],
    "qwen3.6-35b-a3b-heretic-w4a4": [("garage-bAInd/Open-Platypus", 256, 2048)],
    "qwen3.6-35b-a3b-mixed": [("NeelNanda/pile-10k", 64, 2048)],
}
"""By suite: dataset, samples and tokens per sample."""
LINEARS_BY_IGNORE_LIST = [
    # suite, variant, what the card ignores
    (
        "qwen3.6-35b-a3b-heretic-w4a4",
        "w4a4",
        r"lm_head|.*embed_tokens|.*mlp\.gate$|.*shared_expert_gate.*|.*norm.*|.*visual\..*|.*linear_attn\..*",
    ),
    ("qwen3.5-27b", "w4a4-deltanet", r".*in_proj_[ab]$|.*conv1d|.*norm|lm_head|.*embed_tokens|model\.visual"),
    ("qwen3.5-27b", "w4a4", r".*linear_attn|lm_head|.*embed_tokens|model\.visual"),
    ("qwen3.5-9b-w4a4", "w4a4", r".*linear_attn|lm_head|.*embed_tokens|model\.visual"),
]
MIXED = {
    "nvfp4-pack-quantized": r".*mlp\.experts\.\d+\.(gate|up|down)_proj$",
    "float-quantized": r".*self_attn\.(q|k|v|o)_proj$|.*shared_expert\.(gate|up|down)_proj$",
}
"""By the format's name in a checkpoint: which modules the mixed card gives it."""


def suite(name: str) -> Suite:
    return load(FILES[name])


def tensors(name: str, *, with_mtp: bool = False) -> tuple[SourceTensor, ...]:
    return census(published_config(MODELS[name][1]), with_mtp=with_mtp)[1]


def modules(of: tuple[SourceTensor, ...]) -> set[str]:
    """The names of all modules with a weight matrix, fused experts one by one."""
    found = set()
    for tensor in of:
        if tensor.linears:
            found |= {linear.module for linear in tensor.linears}
        elif len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
            found.add(tensor.name.removesuffix(".weight"))
    return found


def chosen(name: str, variant: str) -> dict[str, set[str]]:
    """The modules that a variant quantizes, by format."""
    found: dict[str, set[str]] = {}
    for tensor, form in quantized(tensors(name), recipe_named(suite(name).variants[variant].recipe)):
        found.setdefault(form.compressor, set()).update(linear.module for linear in tensor.linears)
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_suite_in_the_folder_loads_under_the_name_of_its_file(name: str) -> None:
    assert suite(name).name == name


def test_every_published_card_has_its_suite() -> None:
    assert set(MODELS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_every_suite_names_recipes_and_a_protocol_that_exist(name: str) -> None:
    for variant in suite(name).variants.values():
        recipe = recipe_named(variant.recipe)
        assert suite(name).calibration is not None or not recipe.needs_calibration
    measured = suite(name).ppl
    assert measured is not None and all(map(get_protocol, measured.protocols))


@pytest.mark.parametrize("name", MODELS)
def test_a_suite_has_the_source_and_the_calibration_set_of_its_card(name: str) -> None:
    assert suite(name).source.location == MODELS[name][0]
    calibration = suite(name).calibration
    sources = calibration.sources if calibration is not None else ()
    assert all(isinstance(source, DatasetSamples) for source in sources)
    found = [(s.dataset, s.samples, s.max_tokens) for s in sources if isinstance(s, DatasetSamples)]
    assert found == CALIBRATION[name]


def test_the_variants_that_a_card_ships_are_rounded_as_its_tool_rounds() -> None:
    shipped = {
        "qwen3.5-9b-heretic-a16": {"nvfp4a16": "rtn-a16"},
        "qwen3.5-9b-w4a4": {"w4a4-rtn": "w4a4"},
        "qwen3.5-27b": {"w4a4-rtn": "w4a4", "w4a4-deltanet-rtn": "w4a4-deltanet"},
        "qwen3.6-35b-a3b-heretic-w4a4": {"w4a4-rtn": "w4a4"},
        "qwen3.6-35b-a3b-mixed": {"mixed-fp8-rtn": "mixed-fp8", "w4a4-rtn": "w4a4"},
    }
    for name in MODELS:
        variants = suite(name).variants
        rounded = {key: v.recipe for key, v in variants.items() if (v.scales, v.codes) == ("absmax", "rtn")}
        assert rounded == shipped[name]
        # The others are the same formats with what the recipe itself chooses.
        rest = [variant for key, variant in variants.items() if key not in rounded]
        assert all((v.scales, v.codes) == (None, None) and v.recipe in rounded.values() for v in rest)


@pytest.mark.parametrize(("name", "variant", "ignored"), LINEARS_BY_IGNORE_LIST)
def test_a_recipe_quantizes_what_its_cards_ignore_list_leaves(name: str, variant: str, ignored: str) -> None:
    left = {module for module in modules(tensors(name)) if not re.match(ignored, module)}
    assert left
    assert chosen(name, variant) == {"nvfp4-pack-quantized": left}


def test_the_mixed_recipe_gives_each_format_the_modules_that_its_card_does() -> None:
    everything = modules(tensors("qwen3.6-35b-a3b-mixed"))
    expected = {form: {m for m in everything if re.match(pattern, m)} for form, pattern in MIXED.items()}
    assert chosen("qwen3.6-35b-a3b-mixed", "mixed-fp8") == expected


@pytest.mark.parametrize("name", ["qwen3.6-35b-a3b-heretic-w4a4", "qwen3.6-35b-a3b-mixed"])
def test_a_card_counts_122880_nvfp4_keys_in_experts(name: str) -> None:
    for variant in suite(name).variants:
        experts = {module for module in chosen(name, variant)["nvfp4-pack-quantized"] if ".experts." in module}
        assert 4 * len(experts) == 40 * 256 * 3 * 4 == 122_880


def test_the_16_bit_activations_card_counts_128_quantized_tensors_and_its_bytes() -> None:
    name = "qwen3.5-9b-heretic-a16"
    recipe = recipe_named(suite(name).variants["nvfp4a16"].recipe)
    what = plan(*census(published_config(MODELS[name][1])), recipe)
    assert (what.num_quantized, what.num_tensors - what.num_quantized) == (128, 632)
    assert (f"{what.source_bytes / 1e9:.1f}", f"{what.output_bytes / 1e9:.1f}") == ("18.8", "11.2")


def test_the_mixed_card_keeps_19_mtp_tensors() -> None:
    name = "qwen3.6-35b-a3b-mixed"
    recipe = recipe_named(suite(name).variants["mixed-fp8"].recipe)
    config = published_config(MODELS[name][1])
    with_mtp, without = (plan(*census(config, with_mtp=mtp), recipe) for mtp in (True, False))
    assert with_mtp.num_tensors - without.num_tensors == 19
    assert with_mtp.num_quantized == without.num_quantized
    assert f"{with_mtp.source_bytes / 2**30:.0f}" == "67"  # the card's GB are of 2³⁰ bytes


@pytest.mark.parametrize(
    ("name", "depths", "depth_tokens", "prefill_tokens", "setups"),
    [
        ("qwen3.5-9b-heretic-a16", None, None, None, None),
        ("qwen3.5-27b", (0, 4096, 8192), 1 + 32, 2048, None),
        ("qwen3.6-35b-a3b-mixed", None, None, None, ("mtp1",)),
    ],
)
def test_speed_is_measured_at_the_lengths_of_the_card(
    name: str,
    depths: tuple[int, ...] | None,
    depth_tokens: int | None,
    prefill_tokens: int | None,
    setups: tuple[str, ...] | None,
) -> None:
    bench = suite(name).bench
    assert bench is not None and bench.batch_sizes == (1,)
    assert (bench.depths, bench.setups) == (depths, setups)
    assert depth_tokens in (None, bench.depth_tokens) and prefill_tokens in (None, bench.prefill_tokens)


@pytest.mark.parametrize("name", list(MODELS))
def test_the_cards_are_measured_with_vllm_as_they_were(name: str) -> None:
    assert suite(name).engine.name == "vllm"


def test_the_mixed_cards_perplexity_is_that_of_windows_of_512() -> None:
    measured = suite("qwen3.6-35b-a3b-mixed").ppl
    assert measured is not None and measured.protocols == ("wikitext2-512",)
    assert get_protocol("wikitext2-512").window == 512


@pytest.mark.parametrize("name", list(MODELS))
def test_the_cards_expect_the_published_counts_of_the_published_text(name: str) -> None:
    measured = suite(name).ppl
    assert measured is not None
    expected = measured.expected["wikitext2-512"]
    assert expected == Counts(num_tokens=297_053, num_windows=581, num_scored=296_472)
    cut = windows(get_protocol("wikitext2-512"), 297_053)
    assert (len(cut), sum(window.num_scored for window in cut)) == (expected.num_windows, expected.num_scored)
