"""Whether calibration sees what is scored: the same data set, or the very same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from starquant.config.calibration import SourceSpec

WINDOW = 12  # consecutive words that two texts share only when one was made from the other
SHORTEST = 5  # words; a shorter document says nothing about where it came from
#: Tasks, with their variants, that are made of a source's data set, by its kind.
TASKS: Mapping[str, tuple[str, ...]] = {
    "winogrande": ("winogrande",),
    "gsm8k": ("gsm8k",),
    "text": (),
    "testbed": ("testbed",),
    "smol": ("smol",),
    "smol_tasks": ("smol",),
    "smol_text": (),  # smol's tasks are of generated items, not of natural text
}


def dataset_overlap(spec: SourceSpec, task_names: Iterable[str]) -> list[str]:
    """Return the tasks made of the same data set as the source, variants (gsm8k_cot, testbed_facts) included."""
    made_of = TASKS[spec.kind]
    return [name for name in task_names if any(name == task or name.startswith(f"{task}_") for task in made_of)]


def item_overlap(texts: Iterable[str], documents: Iterable[str]) -> int:
    """Return how many documents share a long run of words with the texts, whatever the case and white space.

    A document counts when any 12 consecutive words of it occur in one of the texts; a shorter one when all of it
    does, from 5 words on. Linear in the total number of words.
    """
    words_of_documents = [_words(document) for document in documents]
    lengths = {min(WINDOW, len(words)) for words in words_of_documents if len(words) >= SHORTEST}
    seen: dict[int, set[int]] = {length: set() for length in lengths}
    for words in map(_words, texts):
        for length, windows in seen.items():
            windows.update(_windows(words, length))
    return sum(
        any(window in seen[min(WINDOW, len(words))] for window in _windows(words, min(WINDOW, len(words))))
        for words in words_of_documents
        if len(words) >= SHORTEST
    )


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _windows(words: Sequence[str], length: int) -> Iterator[int]:
    return (hash(tuple(words[i : i + length])) for i in range(len(words) - length + 1))
