"""From an artifact to a published card, with vLLM: what `test_build.py` left is measured, judged and published."""

from typing import Any

from tests.rehearsal.world import MODEL, TOKEN, VARIANT, World

REPOSITORY = "someone/Qwen3.5-9B-NVFP4"


def test_a_vllm_that_refuses_is_told_in_its_own_words(here: World) -> None:
    suite = here.other_suite(("enforce_eager = true", "enforce_eager = true\nkv_cache_gb = 0.0001"))
    ran = here.harness("ppl", "--suite", str(suite), "--variant", VARIANT, "--limit", "1")
    assert ran.code == 1, ran.out + ran.err
    assert f"{VARIANT} failed: vLLM does not start on" in ran.err and "Traceback" not in ran.err


def test_perplexity_is_measured_of_source_and_variant(here: World) -> None:
    ran = here.harness("ppl", "--suite", str(here.suite), "--limit", "1")
    assert ran.code == 0, ran.err
    assert set(here.measured("ppl")) == {"source", VARIANT}
    assert "Δ log-PPL, nats" in ran.out
    assert "decode step takes about four times as long" in ran.err, "the suite forgoes CUDA graphs"


def test_divergence_is_above_the_noise_of_the_engine(here: World) -> None:
    ran = here.harness("fidelity", "--suite", str(here.suite), "--limit", "1")
    assert ran.code == 0, ran.err

    def divergence(row: str) -> float:
        found: list[dict[str, Any]] = here.measured("fidelity")[row].samples
        return sum(one["kl_nats"] for one in found) / sum(one["num_scored"] for one in found)

    noise = [row for row in here.measured("fidelity") if row.startswith("noise")]
    assert noise and divergence(VARIANT) > 10 * max(map(divergence, noise)) >= 0


def test_speed_is_measured_with_depths_and_with_the_mtp_head(here: World) -> None:
    ran = here.harness("bench", "--suite", str(here.suite))
    assert ran.code == 0, ran.err
    rows = {f"{model}{setup}" for model in ("source", VARIANT) for setup in ("", "+mtp1")}
    assert set(here.measured("bench")) == rows
    assert "tok/s" in ran.out and "KV cache, tokens" in ran.out
    plain = here.measured("bench")[VARIANT]
    assert plain.kind("coherence")[0]["coherent"]
    assert plain.run.engine is not None
    assert "Using CpuNvFp4LinearKernel for NVFP4 GEMM" in plain.run.engine["kernels"]["log"]
    drafted = here.measured("bench")[f"{VARIANT}+mtp1"].kind("decode")
    assert {128, 32} <= {one["prompt_tokens"] for one in drafted}
    assert all(one["num_draft_tokens"] > 0 for one in drafted)


def test_a_server_that_is_none_is_told(here: World) -> None:
    ran = here.harness("bench", "--suite", str(here.suite), "--server", here.hub.url, "--variant", VARIANT)
    assert ran.code == 1, ran.err
    assert f"The server at {here.hub.url} answers 401 to /v1/models" in ran.err and "Traceback" not in ran.err


def test_the_gate_judges_what_was_measured_and_names_what_was_not(here: World) -> None:
    ran = here.harness("gate", "--suite", str(here.suite))
    assert ran.code in (1, 3), ran.out + ran.err  # no tasks were run, and a CPU decodes FP4 slower than BF16
    assert "verify" in ran.out and "arithmetic" in ran.out and "score" in ran.out
    assert "Traceback" not in ran.err


def test_the_report_is_written_and_follows_from_the_records(here: World) -> None:
    assert here.harness("report", "--suite", str(here.suite)).code == 0
    assert here.harness("report", "--check", "--suite", str(here.suite)).code == 0
    card = (here.folder / "reports/qwen3.5-9b-w4a4/README.md").read_text()
    assert "mtp1" in card and MODEL in card


def test_publishing_waits_for_the_gate_and_then_arrives_at_the_hub(here: World) -> None:
    publish = ("publish", "--suite", str(here.suite), "--variant", VARIANT, "--repo", REPOSITORY)
    ran = here.harness(*publish, "--dry-run")
    assert ran.code in (1, 3) and "REFUSED" in ran.out, ran.out + ran.err
    suite = here.other_suite(*without_rules((here.folder / here.suite).read_text()))
    ran = here.harness(*publish[:2], str(suite), *publish[3:], token=TOKEN)
    assert ran.code == 0, ran.out + ran.err
    files = here.hub.repositories[REPOSITORY].files
    assert {"README.md", "config.json", "model.safetensors.index.json"} <= set(files)


def without_rules(suite: str) -> tuple[tuple[str, str], ...]:
    """The edits that leave of the gate only the rules that a CPU without tasks can meet."""
    head, *rules = suite.split("[[gate]]")
    kept = [rule for rule in rules if 'metric = "verify"' in rule or 'metric = "arithmetic"' in rule]
    return ((suite, "[[gate]]".join([head, *kept])),)
