"""How the next token is chosen, and the presets that the makers of the models publish.

Source of the presets: the model cards of Qwen3.5 and Qwen3.6 ("Best Practices"); they are names in a suite.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy, whatever else is set; a top_k of 0 keeps all tokens.

    The presence penalty is subtracted once from the logit of every token that was generated before; the repetition
    penalty divides (multiplies, below zero) the logits of those of the prompt too.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()
PRESETS = {
    "thinking-general": Sampling(temperature=1.0, top_p=0.95, top_k=20, presence_penalty=1.5),
    "thinking-coding": Sampling(temperature=0.6, top_p=0.95, top_k=20),
    "instruct-general": Sampling(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5),
    "instruct-reasoning": Sampling(temperature=1.0, top_p=1.0, top_k=40, presence_penalty=2.0),
}
