"""Suites: one TOML file says what is built, measured and held to account, with names and numbers only.

    name = "demo"
    title = "NVFP4 of the embedded demo model"

    [source]
    location = "demo:dense"             # or a folder ("./checkpoint"), or a hub id ("Qwen/Qwen3.5-9B")

    [variants.nvfp4a16]
    recipe = "rtn-a16"

    [variants.w4a4-gptq]
    recipe = "w4a4"
    codes = "gptq"                      # scales and codes are the recipe's own unless the variant names them

    [calibration]
    sources = [{ dataset = "openai/gsm8k", config = "main", split = "train",
                 user = ["question"], assistant = "answer", samples = 256, max_tokens = 2048 }]

    [ppl]
    protocols = ["wikitext2-512", "llamacpp-512"]
    text = { demo = "heldout" }         # or { path = "wiki.txt" }, or { dataset = "Salesforce/wikitext", ... }

    [fidelity]
    text = { demo = "heldout" }

    [setups.mtp1]                       # options of vLLM that are measured beside the suite's own
    speculative_tokens = 1

    [bench]
    text = { demo = "heldout" }
    batch_sizes = [1, 2, 4]
    setups = ["mtp1"]

    [tasks.gsm8k]
    task = "gsm8k"                      # lm-eval's name, or "demo:arithmetic", or a task file ("./my-task.yaml")
    chat = true
    thinking = true
    preset = "thinking-general"

    [audit]
    cap_hit_share = 0.05

    [[gate]]
    metric = "log_ppl"                  # a name of METRICS
    variant = "nvfp4a16"
    versus = "source"                   # or another variant, or "baseline": what `harness gate` wrote down before
    margin = 0.02                       # the largest loss that is accepted, in the metric's unit

    [[claim]]
    kind = "near-lossless"              # what the card says of a variant, if the records support it
    variant = "nvfp4a16"

A key is documented, typed, defaulted and checked as a field in `schema`, `rules` or `texts`, and nowhere else; `load`
checks what one table says of another.

A suite file never inherits from another one, and no number hides in code: `Suite.resolved` writes every default out,
and every run's header holds the resolved suite with its digest.

Meaning never depends on what lies on the disk: a location is a folder if it is *written* as one (it begins with `.`,
`/` or `~`), and a relative path starts at the suite's own folder.
"""
