"""Gathers what the default encoder was distilled from: rows of a text, and of what would be asked to find it.

    python data/encoder_texts.py --docstrings docstrings.parquet --tldr DIR --glosses glosses.parquet --out OUT.parquet

DIR holds tldr_docs.parquet, tldr_queries.parquet and peps.parquet. Pages of tldr whose name's crc32 is a multiple of
five, and the packages of HELD_OUT, are left out: what the encoder is measured by is nothing that it has learnt from.
"""

from __future__ import annotations

import argparse
import re
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Row = tuple[str, str | None]  # a text, and a query that it answers

HELD_OUT = ("bokeh", "celery", "networkx", "redis", "scrapy", "xarray")
MAX_DOCSTRINGS = 75_000
MAX_GLOSSES = 40_000
MAX_CHARS = 320  # of a docstring: the teacher is slow, and what a text is about stands at its beginning
MIN_REST = 60  # characters after the first sentence, for it to be asked for by that sentence
MAX_TITLE = 200


def from_docstrings(path: Path, seed: int) -> list[Row]:
    """The first sentence asks for the rest; where there is no rest, the name's words ask for the sentence."""
    rows: list[Row] = []
    seen = set()
    for entry in pq.read_table(path).to_pylist():
        title = entry["title"]
        body = entry["text"].partition(": ")[2]
        rest = body[len(title) :].strip() if body.startswith(title) else ""
        if len(title) > MAX_TITLE or (title, rest[:100]) in seen:
            continue
        seen.add((title, rest[:100]))
        if entry["package"] in HELD_OUT:
            continue
        if len(rest) >= MIN_REST:
            rows.append((rest[:MAX_CHARS], title))
        else:
            name = entry["id"].rpartition(".")[2]
            words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).replace("_", " ").strip()
            rows.append((f"{entry['id']}: {title}"[:MAX_CHARS], words if " " in words else None))
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[:MAX_DOCSTRINGS]]


def from_tldr(folder: Path) -> list[Row]:
    """The training pages' examples with their queries, and all paragraphs of the PEPs."""
    docs = pq.read_table(folder / "tldr_docs.parquet", columns=["id", "page", "text"]).to_pydict()
    queries = pq.read_table(folder / "tldr_queries.parquet", columns=["id", "query"]).to_pydict()
    asked = dict(zip(queries["id"], queries["query"], strict=True))
    rows: list[Row] = [
        (text, asked.get(id))
        for id, page, text in zip(docs["id"], docs["page"], docs["text"], strict=True)
        if zlib.crc32(page.encode()) % 5 != 0
    ]
    return rows + [(text, None) for text in pq.read_table(folder / "peps.parquet")["text"].to_pylist()]


def from_glosses(path: Path, seed: int) -> list[Row]:
    """Words and what they mean, `lemma, synonyms: gloss`: general English."""
    glosses = pq.read_table(path)["text"].to_pylist()
    order = np.random.default_rng(seed).permutation(len(glosses))
    return [(glosses[i], None) for i in order[:MAX_GLOSSES]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("docstrings", "tldr", "glosses", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    rows = from_docstrings(options.docstrings, options.seed)
    rows += from_tldr(options.tldr) + from_glosses(options.glosses, options.seed)
    pq.write_table(pa.table({"text": [text for text, _ in rows], "query": [query for _, query in rows]}), options.out)
    print(f"{options.out}: {len(rows):,} texts, {sum(query is not None for _, query in rows):,} with a query")


if __name__ == "__main__":
    main()
