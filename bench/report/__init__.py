"""Tables and pictures of what was measured.

    python -m bench.report                     # the newest results of each kind of machine: runs/bench/
    python -m bench.report FILE.jsonl ...      # these
    python -m bench.report --publish           # and into README.md and docs/, each table from the newest
                                               # results that have its rows; it names their file

    results     a file of bench/results/, by groups of rows
    tables      of rows, in Markdown
    headlines   the first tables of a page
    pictures    of rows
    documents   the report, and the tables of README.md and docs/

Each imports what stands above it. Nothing in the documents is typed: each table stands between two comments
that say what it is and from which file it was rendered (tests/bench/test_bench.py renders them again and
compares).
"""
