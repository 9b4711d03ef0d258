"""How the next token is chosen, and the presets that the makers of the models publish.

The presets are those of the model cards of Qwen3.5 and Qwen3.6 ("Best Practices"). A suite's task names one of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """The parameters of sampling. Temperature 0 is greedy, whatever else is set; a `top_k` of 0 keeps all tokens.

    The presence penalty is subtracted once from the logit of every token that was generated before. The repetition
    penalty divides the logit (multiplies it, if it is negative) of every token of the prompt and of the answer so far.
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
