"""The conversations of the demo: two chats over one long document, and a prompt that shares nothing.

One byte is one token, so that no tokenizer has to be downloaded. The model's weights are random: what it
answers means nothing, but it depends on all of the prompt, and that is what the comparison needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

ANSWER_TOKENS: Final = 16
"""Tokens generated per turn: enough to notice a wrong cache, and little work beside the prompt."""

DOCUMENT: Final = """\
THE KEEPER'S HANDBOOK OF THE LIGHTHOUSE AT SKERRY POINT, NINTH EDITION

1. The light. The lamp is lit half an hour before sunset and put out half an hour after sunrise. It shows
two white flashes every fifteen seconds and can be seen, in clear weather, at eighteen nautical miles. No
other light on this coast has the same character; a keeper who changes the interval, for whatever reason,
writes the time of the change in the log and telephones the harbour office.
2. The lens. The lens is of the second order, made of 312 prisms in a frame of gunmetal. It floats in a
bath of mercury, so that a child could turn it with one finger. Prisms are cleaned with spirit of wine
and a linen cloth, never with the sleeve. A cracked prism is not replaced by the keeper: it is masked
with black paper, and the workshop is told its number, counted from the door side.
3. The fog signal. When the church tower of the village can no longer be seen from the gallery, the fog
signal is started. It gives one blast of four seconds in each minute. The compressor needs six minutes
before the first blast, so a keeper starts it when the tower grows pale, and not when it is gone. The
signal is stopped a quarter of an hour after the tower has come back.
4. The log. Every watch writes down wind, sea, visibility, the height of the barometer, and each ship
that passes within two miles. A line is never scratched out. A wrong line gets one stroke, so that it can
still be read, with the initials of the one who drew it.
5. The watch. The watch changes at midnight, at eight in the morning and at four in the afternoon. The
keeper who goes tells the one who comes three things in words, though they are in the log: the state of
the light, the state of the weather, and what is expected. Nobody leaves the lamp room before the other
has put a hand on the rail and said: I have the light.
6. Visitors. Visitors are welcome by day, in fair weather, six at a time. They leave sticks, lamps and
dogs at the foot of the stair. They may turn the lens, one finger each, between noon and one, when the
curtains are drawn against the sun: an open lens at noon is a burning glass that can set fire to the
heath on the far side of the bay. The number of visitors is written in the log, not their names.
7. Failing of the light. If the lamp fails and cannot be lit again within three minutes, the spare lamp
is put in, and the fog signal is sounded meanwhile whatever the weather. If the clockwork fails, the lens
is turned by hand, with a watch laid open on the sill, and the village is called by the telephone for two
people who can count. The light has not failed for longer than three minutes since 1911.
"""

OTHER_DOCUMENT: Final = """\
FIELD NOTES ON BEES, KEPT BY A SCHOOL. In the first warm week of March the hive by the wall flew for an
hour at noon. The children counted ninety bees leaving the board in one minute, and of those that came
back every fourth one carried pollen, pale yellow, from the willow by the brook. In the second week it
rained. The hive was lifted with a spring balance and weighed eleven kilograms, half a kilogram less than
before. In the third week the crocus stood open on the bank, and the pollen turned orange from one day to
the next.
"""


@dataclass
class Chat:
    """One conversation over a document: its prompt so far, one token per byte."""

    document: str
    tokens: list[int] = field(default_factory=list)

    def ask(self, question: str) -> list[int]:
        """Return the prompt of the next turn: all that was said, and `question`."""
        beginning = self.document if not self.tokens else ""
        self.tokens += f"{beginning}\nUser: {question}\nKeeper: ".encode("ascii")
        return list(self.tokens)

    def answered(self, answer: list[int]) -> None:
        """Append what the model answered, so that the next turn's prompt contains it."""
        self.tokens += answer


class Expected:
    """What the cache should hold: every whole chunk of every prompt that was stored."""

    def __init__(self, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._prefixes: set[tuple[int, ...]] = set()

    def stored(self, prompt: list[int]) -> None:
        """Note that `prompt` was stored."""
        step = self.chunk_tokens
        self._prefixes.update(tuple(prompt[:end]) for end in range(step, len(prompt) + 1, step))

    def hit_tokens(self, prompt: list[int]) -> int:
        """Return how many tokens of `prompt` must be hits: whole chunks, and a token left to compute."""
        hit = 0
        for end in range(self.chunk_tokens, len(prompt), self.chunk_tokens):
            if tuple(prompt[:end]) not in self._prefixes:
                break
            hit = end
        return hit
