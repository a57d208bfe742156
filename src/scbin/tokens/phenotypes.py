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
AGE_COLUMNS = ("development_stage", "age")
MOST_NUMBERS, FEW_NUMBERS, FEW_CELLS = 200, 20, 5
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()


def labels_of(column: pd.Series, name: str, *, numbers: bool = False) -> np.ndarray:
    """Return the labels of a column as text (cells,), None where the label is missing.

    Names, never codes, so unused categories do not matter; 1 and 1.0 are both "1". Missing are NaN and what `text_of`
    says. Unless `numbers` are asked for, those with fractions, of more than 200 kinds, or of many for few cells are refused: they are
    measurements. Text and categories may be numbers, but not with fractions and of so many kinds.
    """
    codes, distinct = pd.factorize(column.astype(object).to_numpy(dtype=object), use_na_sentinel=True)
    texts = np.array([text_of(value) for value in distinct] + [None], dtype=object)
    found = pd.to_numeric(pd.Series(texts).dropna(), errors="coerce").to_numpy(dtype=np.float64)
    if not numbers and len(found) and np.isfinite(found).all() and not pd.api.types.is_bool_dtype(column.dtype):
        many = len(found) > MOST_NUMBERS or FEW_NUMBERS < len(found) > (codes >= 0).sum() / FEW_CELLS
        fractions = bool((found != np.rint(found)).any())
        if (many or fractions) if pd.api.types.is_numeric_dtype(column.dtype) else (many and fractions):
            what = f"{name!r} looks continuous ({count(len(found), 'different number')})"
            raise ScbinInputError("I42", f"{what}. Cut it into categories (pandas.cut), or use regression.")
    return texts[codes]


def text_of(value: object) -> str | None:
    """Return a label as text, `None` where it is missing or stands for that ("unknown", "NA" ...); 1 and 1.0 are both "1"."""
    if isinstance(value, float | np.floating) and np.isfinite(value) and value == np.rint(value):
        value = int(value)
    return None if (text := str(value)).strip().lower() in MISSING else text


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
    >>> age_in_years("adult stage") is None
    True
    """
    text = text.strip().lower().replace("human ", "")
    number = "|".join(ORDINALS)
    unit = {"year": 1.0, "month": 1 / 12, "week": 1 / 52, "day": 1 / 365.25}
    if re.match(r"under[- ]1[- ]year[- ]old", text):
        return 1.0
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
    """Return the age classes of labels, and the labels that are in none with their counts."""
    years = {text: age_in_years(text) for text in set(labels) - {None}}
    groups = {text: age_group(age, width) for text, age in years.items()}
    found = np.array([groups.get(text) for text in labels], dtype=object)
    return found, Counter(text for text in labels if text is not None and groups[text] is None)
