"""NLTK's sentence model for tests: the real one where there is one, else an empty one."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "nltk_data"
FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def empty_nltk_data(folder: Path) -> Path:
    """An `nltk_data` with a model that knows no abbreviation: sentences end at . ? and !"""
    model = folder / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name in FILES:
        (model / name).touch()
    return folder


def provide_sentence_model(folder: Path) -> None:
    """Let NLTK find a model in this process; the real one lies beside the checkout, if anywhere."""
    import nltk.data
    from nltk.tokenize import PunktTokenizer

    try:
        PunktTokenizer("english")
    except LookupError:
        nltk.data.path.append(str(SHARED if SHARED.is_dir() else empty_nltk_data(folder)))
