"""Instructions about a list of three to six different words, answered by words of it."""

from __future__ import annotations

import random

WORDS = tuple(
    sorted(
        set(
            "apple river table garden window mountain paper silver bridge candle forest winter summer yellow rabbit "
            "doctor market kitchen island engine bottle camera dragon eagle flower guitar hammer jacket kettle ladder "
            "mirror needle orange pencil queen rocket saddle ticket umbrella valley wagon zebra anchor basket castle "
            "desert empire finger ginger harbor insect jungle knight lemon magnet number ocean pepper school temple "
            "uncle velvet whale yogurt autumn butter carrot dinner effort father ground honey iron joker king lion "
            "metal north olive piano quiet rain snow tiger urban violet water young zero bird cloud dream earth fire "
            "glass house ink jewel key light moon night oak pearl road stone tree voice wind".split()
        )
    )
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
INSTRUCTIONS = {
    "sort": "Put these words in alphabetical order: {words}.",
    "reverse": "Write these words in reverse order: {words}.",
    "nth": "What is the {ordinal} word of this list: {words}?",
    "drop": "Remove {word} from this list: {words}.",
    "first two": "Write the first two words of this list: {words}.",
    "last two": "Write the last two words of this list: {words}.",
    "swap": "Swap the first and the last word of this list: {words}.",
    "letter": "Which of these words begin with the letter {letter}: {words}?",
    "capitals": "Write this list with the {ordinal} word in capitals: {words}.",
}


def draw(rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its answer."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    kind = rng.choice(list(INSTRUCTIONS))
    i = rng.randrange(len(words))
    word = words[i]
    if kind == "letter" and sum(other[0] == word[0] for other in words) > 1:
        return draw(rng)  # several words could be named in any order
    answer = {
        "sort": sorted(words),
        "reverse": words[::-1],
        "nth": [word],
        "drop": [other for other in words if other != word],
        "first two": words[:2],
        "last two": words[-2:],
        "swap": [words[-1], *words[1:-1], words[0]],
        "letter": [word],
        "capitals": [*words[:i], word.upper(), *words[i + 1 :]],
    }[kind]
    instruction = INSTRUCTIONS[kind].format(words=", ".join(words), ordinal=ORDINALS[i], word=word, letter=word[0])
    return f"Question: {instruction}\nAnswer:", f" {', '.join(answer)}"
