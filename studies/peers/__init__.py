"""Other quantizers, and lm-eval, beside ours on the same inputs, and two of our own ways to score: `python -m
studies.peers`, or `nox -s peers`.

    python -m studies.peers ──▶ stopwatch ──▶ harness build …              this environment
                            ├─▶ stopwatch ──▶ studies.peers.compressor     an environment of its own
                            ├─▶ stopwatch ──▶ studies.peers.evaluator      both sides of task evals, in one with either
                            └─▶ stopwatch ──▶ studies.peers.scorer         this environment

`contest` says what is compared, `bench`, `evals` and `scoring` run it and keep records (the last two by `races`),
`stopwatch` times a whole process, ours and theirs alike, and `compressor` alone imports llm-compressor: it pins another
transformers and another compressed-tensors, so it lives in another environment and nothing else of the harness is
imported there.
"""
