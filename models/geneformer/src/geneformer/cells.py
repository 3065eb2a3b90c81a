"""The port's reader of cells: an .h5ad file and a model's folder -> token lists, for jobs that know no model."""

from pathlib import Path

from biote.port import CellsRead


def read_cells(
    h5ad: Path, folder: Path, parquet: Path, layer: str | None = None, id_column: str | None = None
) -> CellsRead:
    """Encode all cells of a file by the dictionaries that lie in the model's folder; see `ModelPort.read_cells`.

    FileNotFoundError, which says what to do, where the folder has no dictionaries. Other arguments and errors as of
    `GeneformerTokenizer.encode_file`.
    """
    from .tokenizer import GeneformerTokenizer  # its libraries would cost every command two hundred megabytes

    tokenizer = GeneformerTokenizer.from_pretrained(folder)
    columns = {"obs_index": "obs_index", "id": "obs_names"}
    report = tokenizer.encode_file(h5ad, parquet, columns, layer, id_column=id_column)
    return CellsRead(report.cells, report.written, *tokenizer.specials_around, report.ids)
