"""Sequences as people have them: FASTA of every make, tables, and what a tokenizer cannot read."""

import gzip
import io
import random
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biote.data.sequences import Cleaner, Record, read_records
from biote.port import installed_ports, port_named

TEXT_PORTS = [name for name, port in installed_ports().items() if port.build_tokenizer is not None]
LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def read(path: Path, content: bytes | str, **columns: str) -> list[tuple[str, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(record.id, record.sequence) for record in read_records(path, **columns)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_fasta_of_every_make(tmp_path, end, mark, pack):
    lines = ["", ">sp|P1|A_B of something", "MKT", "", "A\tY ", ">twice", "AC*", "> twice again", "a-c.", ">last", "W"]
    found = read(
        tmp_path / "x.fa", pack(mark + end.join(lines).encode())
    )  # gzip is known by its content, not its name
    assert found == [("sp|P1|A_B", "MKTAY"), ("twice", "AC*"), ("twice", "a-c."), ("last", "W")]


def test_mixed_line_ends_and_members_of_gzip(tmp_path):
    assert read(tmp_path / "x", ">a\r\nMK\nT\rA\n\r\n>b\rW") == [("a", "MKTA"), ("b", "W")]
    members = gzip.compress(b">a\nM") + gzip.compress(b"K\n>b\nW\n")  # as bgzip writes
    assert read(tmp_path / "x.gz", members) == [("a", "MK"), ("b", "W")]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.text("ABCabc019|_.é", min_size=1), st.text(LETTERS + "*-", max_size=90)), min_size=1),
    st.lists(st.integers(1, 80), min_size=1, max_size=7),
    st.lists(st.sampled_from(["\n", "\r\n", "\r", "\n\n"]), min_size=1, max_size=5),
    st.booleans(),
)
def test_fasta_round_trip(tmp_path_factory, records, widths, ends, packed):
    """With any wrapping and line ends; ids may be there twice, and sequences empty."""
    rows = []
    for number, (name, sequence) in enumerate(records):
        rows.append(f">{name}" + (" described > so" if number % 2 else ""))
        width = widths[number % len(widths)]
        rows += [sequence[start : start + width] for start in range(0, len(sequence), width)]
    text = "".join(row + ends[number % len(ends)] for number, row in enumerate(rows)).encode()
    path = tmp_path_factory.getbasetemp() / "round.fasta"
    assert read(path, gzip.compress(text) if packed else text) == records


PACKED = gzip.compress("".join([">a\n", *random.Random(0).choices(LETTERS + "\n", k=50_000)]).encode())
BROKEN = PACKED[:10] + b"\xff" + PACKED[11:]  # no such kind of block


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.fa", "", "there is no sequence in it"),
        ("x.fa", "\n \n", "there is no sequence in it"),
        ("x.fa", "\nMKT\n>a\nMK", "the first line of a FASTA file begins with '>', not with 'MKT'"),
        ("x.fa", "id,sequence\na,MK", "begins with '>', not with 'id,sequence'"),
        ("x.fa", ">a\nMK\n>\nMK", "record 2 has no id"),
        ("x.fa", ">a\nMK\n> \nMK", "record 2 has no id"),
        ("x.fa", b">a\nMK\xe9T", "is not text in UTF-8: .* at byte 5"),
        ("x.fa", ">a\nMK".encode("utf-16"), "is not text in UTF-8"),
        ("x.fa.gz", PACKED[:9_000], "is a damaged gzip file .*: copy it again"),
        ("x.fa.gz", PACKED[:5], "is a damaged gzip file .*: copy it again"),
        ("x.fa.gz", BROKEN, "is a damaged gzip file .*: copy it again"),
        ("x.fa.gz", PACKED[:-6] + b"\0\0" + PACKED[-4:], "is a damaged gzip file .CRC check failed"),
        ("x.fa.gz", gzip.compress(b""), "there is no sequence in it"),
        ("x.csv", "", "there is no column 'id'; it has none"),
        ("x.csv", "id,sequence\n", "there is no sequence in it"),
        ("x.csv", "name,sequence\na,MK", "there is no column 'id'; it has name, sequence"),
        ("x.csv", "id,seq\na,MK", "there is no column 'sequence'; it has id, seq"),
        ("x.csv", "id,sequence,sequence\na,MK,ML", "there are 2 columns 'sequence'"),
        ("x.csv", "id,sequence\na,MK\nb", "line 3 has fewer fields than the header"),
        ("x.csv", "id,sequence\na,of E. coli, MK", "line 2 has more fields than the header: quote those with a ','"),
        ("x.csv", 'id,sequence\n"a,MK', "unexpected end of data"),
        ("x.csv", "id,sequence\n,MK", "record 1 has no id"),
        ("x.csv.gz", gzip.compress(b"id,sequence\na,MK")[:-9], "is a damaged gzip file"),
        ("x.tsv", "id,sequence\na,MK", "there is no column 'id'; it has id,sequence"),
        ("x.parquet", "PAR1", "Parquet"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, said):
    with pytest.raises(ValueError, match=f"^{tmp_path / name}.*{said}"):
        read(tmp_path / name, content)


@pytest.mark.parametrize("name", ["x.fa", "x.csv", "x.parquet", "-x"])
def test_no_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / name)):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.tsv", "\t"), ("x.TSV", "\t"), ("x.csv.gz", ",")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables(tmp_path, name, delimiter, end):
    rows = [
        ["organism", "seq", "name"],
        ['"E.\ncoli, ""K""\t12"', "MK T", "a"],
        ["", '"AC"', " a "],
        [],
        ["x", "", "b"],
    ]
    text = ("\ufeff" + end.join(delimiter.join(row) for row in rows)).encode()
    found = read(
        tmp_path / name,
        gzip.compress(text) if name.endswith("gz") else text,
        id_column="name",
        sequence_column="seq",
    )
    assert found == [("a", "MKT"), ("a", "AC"), ("b", "")]


def test_a_long_field(tmp_path):
    """Titin has 34,350 residues, the csv module's own limit is 131,072 characters."""
    assert read(tmp_path / "x.csv", "id,sequence\na," + 200_000 * "M") == [("a", 200_000 * "M")]


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet(tmp_path, kind):
    def made(values):
        text = pa.array(values, pa.string() if kind == "dictionary" else pa.type_for_alias(kind))
        return text.dictionary_encode() if kind == "dictionary" else text

    ids = [f"p{number % 5000}" for number in range(9000)]
    sequences = [LETTERS[number % 20 :] for number in range(9000)]
    pq.write_table(pa.table({"n": made(ids), "other": range(9000), "s": made(sequences)}), tmp_path / "x.parquet")
    found = [(one.id, one.sequence) for one in read_records(tmp_path / "x.parquet", "n", "s")]
    assert found == list(zip(ids, sequences, strict=True))


def test_parquet_of_pandas(tmp_path):
    frame = pd.DataFrame({"id": [7, 8], "sequence": pd.Categorical([" MK\n", "MK"])})
    frame.to_parquet(tmp_path / "x.parquet")
    assert [(one.id, one.sequence) for one in read_records(tmp_path / "x.parquet")] == [("7", "MK"), ("8", "MK")]
    assert next(read_records(tmp_path / "x.parquet", "sequence")) == Record("MK", "MK")


@pytest.mark.parametrize(
    ("names", "columns", "said"),
    [
        (["id", "sequence"], [["a", None], ["MK", "MK"]], "row 2 lacks its id"),
        (["id", "sequence"], [["a", "b"], [None, "MK"]], "row 1 lacks its sequence"),
        (["id", "sequence"], [["a", " "], ["MK", "MK"]], "record 2 has no id"),
        (["id", "sequence"], [[b"a"], ["MK"]], "the column id holds binary, not text"),
        (["id", "sequence"], [["a"], [7]], "the column sequence holds int64, not text"),
        (["id", "sequence"], [[0.5], ["MK"]], "the column id holds double, not text"),
        (["id", "seq"], [["a"], ["MK"]], "there is no column 'sequence'; it has id, seq"),
        (["id", "sequence", "sequence"], [["a"], ["MK"], ["ML"]], "there are 2 columns 'sequence'"),
        (["id", "sequence"], [pa.array([], pa.string())] * 2, "there is no sequence in it"),
    ],
)
def test_parquet_that_cannot_be_read(tmp_path, names, columns, said):
    pq.write_table(pa.Table.from_arrays([pa.array(column) for column in columns], names), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'x.parquet'}: {said}"):
        list(read_records(tmp_path / "x.parquet"))


def test_stdin(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(gzip.compress(b">a\nMK"))

    monkeypatch.setattr("sys.stdin", Stdin)
    assert list(read_records("-")) == [Record("a", "MK")]
    Stdin.buffer = io.BytesIO(b"MK")
    with pytest.raises(ValueError, match=r"^stdin: the first line"):
        list(read_records("-"))


@pytest.fixture(params=TEXT_PORTS)
def clean(request: pytest.FixtureRequest) -> Cleaner:
    return Cleaner(port_named(request.param).build_tokenizer())


def cleaned(clean: Cleaner, sequence: str) -> str:
    return clean(Record("p", sequence)).sequence


def test_what_is_changed_is_counted(clean):
    assert cleaned(clean, LETTERS) == LETTERS
    assert clean.report() == ""
    assert cleaned(clean, "mkTA") == "MKTA"
    assert cleaned(clean, "MK-T.A~*") == cleaned(clean, "MKTA*-") == "MKTA"
    assert cleaned(clean, 1500 * "a") == 1500 * "A"
    assert clean.report() == "1,502 small letters read as capitals, 4 gaps left out, 2 stops (*) at the end left out"


@pytest.mark.parametrize("letter", "BJOUXZ")
def test_rare_letters(clean, letter):
    """One that the model lacks is X, or where it lacks X too one unknown token each; never a silent one."""
    vocabulary = clean.tokenizer.get_vocab()
    found = cleaned(clean, f"M{letter}{letter.lower()}K")
    ids = clean.tokenizer(found, add_special_tokens=False)["input_ids"]
    if letter in vocabulary:
        expected, said = vocabulary[letter], ""
    elif "X" in vocabulary:
        expected, said = vocabulary["X"], ", 2 residues that the model does not know read as X"
    else:
        expected, said = clean.tokenizer.unk_token_id, ", 2 residues that the model does not know read as <unk>"
    assert ids == [vocabulary["M"], expected, expected, vocabulary["K"]]
    assert clean.report() == f"1 small letters read as capitals{said}"


@pytest.mark.parametrize(
    ("sequence", "said"),
    [
        ("", "has no residues"),
        ("*", "has no residues"),
        ("--.", "has no residues"),
        ("-*", "has no residues"),
        ("MK1T", "has '1' at position 3"),
        ("--M*K", "has '\\*' at position 4"),
        ("MK**", "has '\\*' at position 3"),
        ("MK T", "has ' ' at position 3"),
        ("MK\n", "has '\\\\n' at position 3"),
        ("M<mask>K", "has '<' at position 2"),
        ("MKé", "has 'é' at position 3"),
        ("mkß", "has 'ß' at position 3"),
        ("M\u039a", "has '\u039a' at position 2"),  # a Greek letter that looks like K
        ("MK\uff21", "has '\uff21' at position 3"),  # a full-width A
        ("MK²", "has '²' at position 3"),
    ],
)
def test_what_is_no_residue(clean, sequence, said):
    with pytest.raises(ValueError, match=f"^p {said}"):
        cleaned(clean, sequence)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.text())
def test_any_text_is_read_letter_by_letter_or_refused(text):
    for port in TEXT_PORTS:
        tokenizer = port_named(port).build_tokenizer()
        try:
            found = cleaned(Cleaner(tokenizer), text)
        except ValueError:
            continue
        assert len(tokenizer(found, add_special_tokens=False)["input_ids"]) == len(found) > 0
