"""VQA accuracy as the official script computes it (GT-Vision-Lab/VQA, vqaEval.py), answer by answer.

    accuracy = mean over the 10 people's answers of min(matches among the other 9 / 3, 1)

after normalising punctuation, number words, articles and contractions. As in the official script, people's answers
are only stripped of punctuation, and only where they differ. FARE's copy of it normalises them like the prediction.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = [*';/[]"{}()=+\\_-><@`,?!']
# A full stop that no digit follows. The odd look-ahead is the official one; it never excludes anything.
_FULL_STOP = re.compile(r"(?!<=\d)(\.)(?!\d)")
_THOUSANDS = re.compile(r"(\d)(\,)(\d)")
# The official call passes re.UNICODE, which is 32, as the count.
_MOST_FULL_STOPS = 32

_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
you're you've
"""


def _contractions() -> dict[str, str]:
    """The official table: each contraction by its spellings without one apostrophe."""
    table: dict[str, str] = {}
    for word in _CONTRACTED.split():
        places = [index for index, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in places}
    # The one entry of the official table that removes an apostrophe.
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """The answer for a comparison: lower case, without punctuation and articles, digits for number words."""
    return _words(_strip_punctuation(_one_line(answer)))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy in [0, 1] of a prediction, given the answers of (usually ten) people."""
    found = normalise(prediction)
    given = list(answers)
    if len(set(given)) > 1:
        given = [_strip_punctuation(answer) for answer in given]
    matches = [answer == found for answer in given]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(given)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(answer: str) -> str:
    text = answer
    for mark in _PUNCTUATION:
        # A mark is deleted next to a space, and everywhere if the answer has a number like 1,000; else it is a space.
        vanishes = f"{mark} " in answer or f" {mark}" in answer or _THOUSANDS.search(answer) is not None
        text = text.replace(mark, "" if vanishes else " ")
    return _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)


def _words(answer: str) -> str:
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
