"""Which column of a file holds the Ensembl ids, and which of them the dictionary knows."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import pandas as pd

from .counts import RAW, Source, warn

FEW_GENES = 0.1  # of a file's genes in the dictionary: less is no transcriptome of the dictionary's kind
SUFFIX = r"\..*$|-\d+$"  # what stands behind an Ensembl id: a version, or the number that makes a name unique
OWN = "ensembl_id"  # the column that is meant for this
NAMES = "var_names"


@dataclass
class GeneIds:
    """Each gene's id [G] in capitals, where it stands, which the dictionary knows, and which without a suffix."""

    place: str
    ids: pd.Series
    known: pd.Series
    suffixed: pd.Series


def gene_ids(source: Source, genes: Collection[str], id_column: str | None) -> GeneIds:
    """The ids that `id_column` holds, or else those of which the dictionary knows the most, suffixes aside.

    Without `id_column`: var["ensembl_id"] if the dictionary knows any of it; else the names of var and its columns of
    text are compared, the names first if there is a tie. One warning names a column that was found so, one what is
    lost by mistake. ValueError if no id is known.
    """
    found = _looked_up(source, genes, id_column)
    n_known, n_genes, message = int(found.known.sum()), len(found.ids), ""
    counted = f"{n_known} of {n_genes} genes are in the token dictionary"
    if len(found.suffixed):
        message = (
            f"{counted}; {len(found.suffixed)} more would be without the suffix of their ids, as in "
            f"{_some(found.suffixed)}: "
            f'adata.{_prefix(source)}var["{OWN}"] = adata.{found.place}.str.replace(r"{SUFFIX}", "", regex=True) '
            "strips it"
        )
    elif n_known < FEW_GENES * n_genes or not n_known:
        looked = "" if id_column else f"; var['{OWN}'], var_names and the columns of text in var were looked at"
        message = (
            f"{counted}: the ids in {found.place} are like {_some(found.ids[~found.known])}, the dictionary's like "
            f"{_some(genes)}{looked}; id_column= names a column"
        )
    if not n_known:
        raise ValueError(message)
    if message:
        warn(message, source.path, 6)
    return found


def _looked_up(source: Source, genes: Collection[str], id_column: str | None) -> GeneIds:
    var, prefix = source.var, _prefix(source)

    def look_up(name: str) -> GeneIds:
        column = var.index.to_series() if name == NAMES else var[name]
        ids = column.astype(object).where(column.notna(), "").astype(str).str.upper()
        known = ids.isin(genes)
        unknown = ids[~known]
        place = f"{prefix}{NAMES}" if name == NAMES else f"{prefix}var[{name!r}]"
        return GeneIds(place, ids, known, unknown[unknown.str.replace(SUFFIX, "", regex=True).isin(genes)])

    for name in (OWN, id_column):
        if name is not None and name != NAMES and list(var.columns).count(name) > 1:
            raise ValueError(f"{prefix}var has several columns {name}: rename them")
    if id_column is not None:
        if id_column != NAMES and id_column not in var:
            raise ValueError(f"{prefix}var has no column {id_column}; it has {', '.join(map(str, var.columns))}")
        return look_up(id_column)
    own = look_up(OWN) if OWN in var else None
    if own is not None and _matches(own):
        return own
    names = look_up(NAMES)
    others = [look_up(name) for name in var.columns.drop_duplicates(keep=False) if _is_text(var[name])]
    best = max((names, *others), key=lambda found: (_matches(found), int(found.known.sum())))
    if best is not names and best.known.any():
        warn(
            f"the genes' ids are read from {best.place}, where the dictionary knows {_matches(best)} of "
            f"{len(best.ids)} (in {names.place}, like {_some(names.ids)}, {_matches(names)}); "
            f"id_column={best.ids.name!r} says so without this warning",
            source.path,
            7,
        )
    return own if own is not None and not _matches(best) else best


def _matches(found: GeneIds) -> int:
    return int(found.known.sum()) + len(found.suffixed)


def _is_text(column: pd.Series) -> bool:
    return isinstance(column.dtype, pd.CategoricalDtype) or pd.api.types.is_string_dtype(column.dtype)


def _prefix(source: Source) -> str:
    return "raw." if source.place == RAW else ""


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) or "none"
