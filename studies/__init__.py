"""Programs that produce reports and the embedded models. They use the package `harness`; the wheel leaves them out.

Run them from the repository's root:

    python -m studies.peers         llm-compressor, lm-eval and the harness on the same inputs (reports/peers)
    python -m studies.simulation    how often the statistics are right, on data with a known truth (reports/statistics)
    python -m studies.startup       CPU time of starting a command, beside another checkout
    python -m studies.demo_model    the training of the embedded models (harness/demo)
"""
