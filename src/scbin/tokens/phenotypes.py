"""Labels of cells into control tokens; ages from text."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scbin._errors import ScbinInputError, count

if TYPE_CHECKING:
    from scbin.tokens.vocabulary import Phenotype

MISSING = {"", "unknown", "nan", "na", "n/a", "<na>"}  # in any case; "none" is a label, as in untreated cells
COLUMNS = {"age": ("age", "development_stage"), "cell_type": ("cell_type",), "sex": ("sex",)}  # CELLxGENE names
AGE_COLUMNS = ("development_stage", "age")
LONGEST = 512
MOST_NUMBERS = 200
FEW_NUMBERS, FEW_CELLS = 20, 5  # of text or categories: doses may have fractions, but they are few, or cells share them
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
# days after fertilization at which Carnegie stages 1 to 23 begin
CARNEGIE_DAYS = (1, 2, 4, 6, 7, 13, 16, 18, 20, 22, 24, 26, 28, 32, 33, 37, 41, 44, 47, 50, 52, 54, 56)


def labels_of(column: pd.Series, name: str) -> np.ndarray:
    """Return the labels of a column as text (cells,), None where the label is missing.

    Names, never codes, so unused categories do not matter; 1 and 1.0 are both "1". Missing are NaN and what `is_missing`
    says. Numbers with fractions, of more than 200 kinds, or of many for few cells are refused: they are measurements. Text and categories may be numbers,
    but not with fractions and a kind of its own for every few cells.
    """
    values = column.astype(object).to_numpy(dtype=object)
    codes, distinct = pd.factorize(values, use_na_sentinel=True)
    texts = np.array([text_of(value) for value in distinct] + [None], dtype=object)
    if _looks_continuous(column, distinct, texts, int((codes >= 0).sum())):
        found = f"{name!r} looks continuous ({count(len(distinct), 'different number')})"
        raise ScbinInputError("I42", f"{found}. Cut it into categories (pandas.cut), or use regression.")
    longest = max((text for text in texts if text is not None), key=len, default="")
    if len(longest) > LONGEST:
        found = f"{name!r} has a label of {len(longest):,} characters ({longest[:40]!r}...)"
        raise ScbinInputError("I41", f"{found}; the limit is {LONGEST}.")
    return texts[codes]


def _looks_continuous(column: pd.Series, distinct: np.ndarray, texts: np.ndarray, n_cells: int) -> bool:
    """Whether the values are measurements, be they numbers or text."""
    if pd.api.types.is_numeric_dtype(column.dtype) and not pd.api.types.is_bool_dtype(column.dtype):
        numbers = pd.to_numeric(pd.Series(distinct), errors="coerce").dropna().to_numpy(dtype=np.float64)
        rare = FEW_NUMBERS < len(numbers) and n_cells < FEW_CELLS * len(numbers)  # counts, say, not clusters
        return len(numbers) > MOST_NUMBERS or rare or bool((numbers != np.rint(numbers)).any())
    known = [text for text in texts if text is not None]
    if len(known) <= FEW_NUMBERS or (n_cells >= FEW_CELLS * len(known) and len(known) <= MOST_NUMBERS):
        return False
    numbers = pd.to_numeric(pd.Series(known), errors="coerce").to_numpy(dtype=np.float64)
    return bool(np.isfinite(numbers).all() and (numbers != np.rint(numbers)).any())


def is_missing(text: str) -> bool:
    """Return whether a text stands for a label that is not there: `""`, "unknown", "nan", "na", "n/a" or "<NA>", in any case."""
    return text.strip().lower() in MISSING


def text_of(value: object) -> str | None:
    """Return a label as text, `None` where it is missing; 1 and 1.0 are both "1"."""
    if isinstance(value, float | np.floating) and np.isfinite(value) and value == np.rint(value):
        value = int(value)
    text = str(value)
    return None if is_missing(text) else text


def values_of(labels: np.ndarray) -> tuple[str, ...]:
    """Return the distinct labels in a fixed order: numbers by size, then text by the alphabet."""
    texts = {label for label in labels if label is not None}
    numbers = {text for text in texts if re.fullmatch(r"-?\d+(\.\d+)?", text)}
    return (*sorted(numbers, key=lambda text: (float(text), text)), *sorted(texts - numbers))


def token_ids(labels: np.ndarray, phenotype: Phenotype) -> tuple[np.ndarray, Counter[str]]:
    """Return the token of each cell, and the labels that the vocabulary does not know with their counts."""
    known = {value: phenotype.first_id + k for k, value in enumerate(phenotype.values)}
    ids = np.array([known.get(text, phenotype.missing_id) for text in labels], dtype=np.int64)
    return ids, Counter(text for text in labels if text is not None and text not in known)


# ---- ages -----------------------------------------------------------------------------------------------------------


def age_in_years(text: str) -> float | None:
    """Return the age that a CELLxGENE development stage names, in years; None where it names none.

    Examples
    --------
    >>> age_in_years("34-year-old human stage"), age_in_years("third decade stage"), age_in_years("6-month-old stage")
    (34.0, 25.0, 0.5)
    >>> round(age_in_years("Carnegie stage 17"), 2), age_in_years("adult stage") is None
    (0.11, True)
    """
    text = text.strip().lower().replace("human ", "")
    number = "|".join(ORDINALS)
    unit = {"year": 1.0, "month": 1 / 12, "week": 1 / 52, "day": 1 / 365.25}
    if re.match(r"under[- ]1[- ]year[- ]old", text):
        return 1.0
    if m := re.fullmatch(r"carnegie stage (\d+)", text):
        return CARNEGIE_DAYS[int(m[1]) - 1] / 365.25 if 1 <= int(m[1]) <= len(CARNEGIE_DAYS) else None
    if m := re.fullmatch(r"(\d+)\s*[-\N{EN DASH}]\s*(\d+)[- ]years?(?:[- ]old)?(?: stage)?", text):
        return (float(m[1]) + float(m[2])) / 2
    if m := re.fullmatch(r"(\d+(?:\.\d+)?)(?:[- ](year|month|week|day)s?(?:[- ]old)?(?: and over)?(?: stage)?)?", text):
        return float(m[1]) * unit[m[2] or "year"]
    words = rf"(?:(\d+)(?:st|nd|rd|th)|({number})) (week post-fertilization|lmp month|decade)(?: of life)?(?: stage)?"
    if m := re.fullmatch(words, text):
        n = float(m[1] or ORDINALS.index(m[2]) + 1)
        return {"decade": 10 * n - 5, "lmp month": n / 12}.get(m[3], n / 52)
    return None


def age_group(years: float | None, width: int) -> str | None:
    """Return the class of an age, [low, high): by 20 years from 0, by 10 years from 10 (children have none there)."""
    if years is None or not np.isfinite(years) or years < 0 or (width == 10 and years < 10):
        return None
    if years >= 80:
        return ">=80"
    low = int(years // width) * width
    return f"{low}-{low + width}" if low else f"<{width}"


def age_labels(labels: np.ndarray, width: int) -> tuple[np.ndarray, Counter[str]]:
    """Return the age classes of labels, and the labels that name no age with their counts."""
    years = {text: age_in_years(text) for text in set(labels) - {None}}
    groups = {text: age_group(age, width) for text, age in years.items()}
    found = np.array([groups.get(text) for text in labels], dtype=object)
    return found, Counter(text for text in labels if text is not None and years[text] is None)
