"""How the embedded models were made: `train` made their weights, `figures` says what they have learnt.

    python -m studies.demo_model --out DIR
    python -m studies.demo_model --model moe --out DIR
    python -m studies.demo_model --evaluate DIR

`network` has their shapes and the MTP head, `tokenizer` the tokenizer, `drills` the text that only training reads. All
other text comes from `harness.demo.corpus`.
"""
