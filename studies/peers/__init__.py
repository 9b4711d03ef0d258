"""Other quantizers, and lm-eval, beside ours on the same inputs, and two of our own ways to score.

    python -m studies.peers ──▶ stopwatch ──▶ harness build …              this environment
                            ├─▶ stopwatch ──▶ studies.peers.compressor     llm-compressor's environment
                            ├─▶ stopwatch ──▶ studies.peers.answerer       an environment with lm-eval's model classes
                            └─▶ stopwatch ──▶ studies.peers.scorer         this environment

`contest` says what is compared. `speed`, `quality`, `agreement`, `tasks` and `scoring` each measure a part and keep its
records; `races` is what the parts about speed share, `quantizers` what the parts about quantizers share. `stopwatch`
times a whole process, ours and theirs alike. `tables` and `page` show the records; `chunks` walks the distributions
of several engines in step.

Only `compressor` imports llm-compressor, which pins another transformers and another compressed-tensors. It runs in
another environment, which has nothing else of ours.
"""
