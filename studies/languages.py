"""A language that no embedded model is trained on: its text is foreign to them, though the same process makes it."""

from harness.demo.language import Language

FAR = Language(
    name="far",
    seed=23,
    onsets=("ch", "h", "j", "w", "y", "z", "sh", "th", "k", "m", "n", "v", "kw", "sk", "fl"),
    nuclei=("a", "o", "u", "y", "ea"),
    codas=("", "", "", "k", "p", "f", "x", "sk"),
    verb_final=True,
    modifiers_follow=True,
    plural="im",
    verb_endings=("ak", "ud"),
    article="eth",
    relative="zu",
    both="ja",
    when="wo",
    because="kwer",
    lives_in=("haltak", "ni"),
    returns_to=("vendak", "cha"),
    pronouns=("oth", "ath", "uth"),
)
