"""CIDEr of captions, × 100: pycocoevalcap's scorer on the tokens of Stanford's PTB tokeniser.

Inverse document frequencies come from the references of the evaluated images only, so that a score compares only
with scores on the same images. An image's score does not depend on the other images' captions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer import ptbtokenizer

from datamerge.runtime.messages import warn
from storage_schemas import DatamergeError

NOT_COMPARABLE = (
    "Java was not found, so captions were split by a plain regular expression: CIDEr is not comparable to published "
    "numbers; install a Java runtime and evaluate again"
)
PTB, PLAIN = "PTBTokenizer", "regular expression (not comparable)"


class CaptionScorer:
    """CIDEr against fixed references.

    Args:
        references: captions of every evaluated image, by its key.

    Attributes:
        tokeniser: which one is used.

    Raises:
        DatamergeError: the tokeniser fails.
    """

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.tokeniser = PTB if shutil.which("java") else PLAIN
        if self.tokeniser == PLAIN:
            warn(NOT_COMPARABLE)
        self._tokens: dict[str, str] = {}
        keys = [key for key, captions in references.items() for _ in captions]
        tokens = self._tokenise([caption for captions in references.values() for caption in captions])
        self._references: dict[str, list[str]] = {}
        for key, caption in zip(keys, tokens, strict=True):
            self._references.setdefault(key, []).append(caption)

    def scores(self, captions: Mapping[str, str]) -> dict[str, float]:
        """CIDEr × 100 of captions of some of the images, by their keys."""
        tokens = dict(zip(captions, self._tokenise(list(captions.values())), strict=True))
        # The scorer takes document frequencies from its references, so that it needs those of all images.
        hypotheses = {key: [tokens.get(key, "")] for key in self._references}
        _, scores = Cider().compute_score(self._references, hypotheses)
        found = dict(zip(self._references, scores.tolist(), strict=True))
        return {key: 100 * float(found[key]) for key in captions}

    def _tokenise(self, captions: Sequence[str]) -> list[str]:
        # One line per caption: the tokeniser takes a form feed or U+2028 for the end of a line too.
        lines = [" ".join(caption.split()) for caption in captions]
        # Starting Java takes most of the time, and models repeat captions.
        new = list(dict.fromkeys(line for line in lines if line not in self._tokens))
        if new:
            found = _ptb(new) if self.tokeniser == PTB else [_plain(line) for line in new]
            self._tokens |= dict(zip(new, found, strict=True))
        return [self._tokens[line] for line in lines]


def _ptb(lines: Sequence[str]) -> list[str]:
    """Tokens of pycocoevalcap's PTBTokenizer, without writing into the folder of its package."""
    folder = Path(str(ptbtokenizer.__file__)).parent
    jar = folder / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)  # the last line may be empty and needs its end
        file.flush()
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", file.name]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    found = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(found) != len(lines):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DatamergeError(f"Stanford's tokeniser: expected {len(lines)} lines, found {len(found)}: {reason}")
    return [_without_punctuation(line.rstrip().split(" ")) for line in found]


def _plain(line: str) -> str:
    return _without_punctuation(re.findall(r"\w+(?:'\w+)?|[^\w\s]", line.lower()))


def _without_punctuation(words: Sequence[str]) -> str:
    return " ".join(word for word in words if word and word not in ptbtokenizer.PUNCTUATIONS)
