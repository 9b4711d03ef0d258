"""Other quantizers beside ours, on the same inputs: `python -m harness.peers`, or `nox -s peers`.

    python -m harness.peers ──▶ stopwatch ──▶ harness build …              this environment
                            └─▶ stopwatch ──▶ harness.peers.compressor     an environment of its own

`contest` says what is compared, `bench` runs it and keeps records, `stopwatch` times a whole process, ours and
theirs alike, and `compressor` alone imports llm-compressor: it pins another transformers and another
compressed-tensors, so it lives in another environment and nothing else of the harness is imported there.
"""
