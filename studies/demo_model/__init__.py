"""How the embedded models were made: `train` made their weights, `evaluate` says what they have learnt.

    python -m studies.demo_model --out DIR
    python -m studies.demo_model --model moe --out DIR
    python -m studies.demo_model --evaluate DIR

`network` has their shapes and the MTP head, `tokenizer` the tokenizer; the text is made by `harness.demo.corpus`.
"""
