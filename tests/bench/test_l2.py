"""What Nsight Compute writes becomes rows of the results."""

from pathlib import Path

import pytest

from bench import measure, profiling

pytestmark = [pytest.mark.needs("bench"), pytest.mark.host]
V = 1000
# Counters of a launch: bytes read and written, nanoseconds, sectors read through L2, and hits among them.
LAUNCHES = [
    (24_000, 16_000, 2_000, 1_000, 250),  # 8 x 1000 bfloat16: half of the second read from L2
    (16_000, 16_000, 2_000, 1_000, 500),  # all of it
    (32_000, 8_000, 4_000, 1_000, 0),  # 4 x 1000 float32: none
]
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size"'
)
HEAD += ',"Device","CC"'
WHERE = '"4711","python3.12","127.0.0.1","_ppo_loss_kernel","1","7","(256, 1, 1)","(8192, 1, 1)","0","9.0"'
NAMES = (profiling.READ, profiling.WRITTEN, profiling.TIME, profiling.SECTORS, profiling.HITS)
UNITS = ("byte", "byte", "ns", "sector", "sector")
BEFORE = (
    '==PROF== Connected to process 4711 (/usr/bin/python3.12)\n==PROF== Profiling "_ppo_loss_kernel": 0%\n'
)


def one_line_a_counter(units: tuple[str, ...] = UNITS) -> str:
    lines = [HEAD + ',"Section Name","Metric Name","Metric Unit","Metric Value"']
    for number, values in enumerate(LAUNCHES):
        for name, unit, value in zip(NAMES, units, values):
            section = "Command line profiler metrics"
            lines.append(f'"{number}",{WHERE},"{section}","{name}","{unit}","{value:,}"')
    return BEFORE + "\n".join(lines) + "\n"


def one_line_a_launch() -> str:
    lines = [HEAD + "," + ",".join(f'"{name}"' for name in NAMES)]
    lines.append(",".join(['""'] * 11) + "," + ",".join(f'"{unit}"' for unit in UNITS))
    for number, values in enumerate(LAUNCHES):
        lines.append(f'"{number}",{WHERE},' + ",".join(f'"{value:,}"' for value in values))
    return BEFORE + "\n".join(lines) + "\n"


@pytest.mark.parametrize("text", [one_line_a_counter(), one_line_a_launch()], ids=["long", "raw"])
def test_counters_become_rows(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "l2.csv").write_text(text)
    results = tmp_path / "rows.jsonl"
    assert (
        profiling.main(["read", str(tmp_path / "l2.csv"), "--results", str(results), "--size", "tiny"]) == 0
    )
    rows, others = measure.read(results)
    assert others == []
    assert [row.provider for row in rows] == ["out of place", "in place", "tile of a head"]
    assert [row.found["reads"] for row in rows] == [1.5, 1.0, 2.0]
    assert [row.found["second_read_from_l2"] for row in rows] == [0.5, 1.0, 0.0]
    assert [row.found["writes"] for row in rows] == [1.0, 1.0, 0.5]
    assert [row.found["l2_hits"] for row in rows] == [0.25, 0.5, 0.0]
    assert [row.found["l2_reads"] for row in rows] == [2.0, 2.0, 2.0]
    assert [row.ms for row in rows] == [0.002, 0.002, 0.004]
    assert [row.gb_per_s for row in rows] == [20.0, 16.0, 10.0]
    assert [row.dtype for row in rows] == ["bfloat16", "bfloat16", "float32"]
    assert "out of place, 8 x 1000 bfloat16: 0.002 ms, 20.0 GB/s, reads 1.5" in capsys.readouterr().out


def test_units_are_heeded() -> None:
    text = one_line_a_counter(("Kbyte", "Mbyte", "us", "sector", "sector"))
    first = profiling.counters(text)[0]
    assert first[profiling.READ] == 24e6
    assert first[profiling.WRITTEN] == 16e9
    assert first[profiling.TIME] == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n", "no table of ncu.*\n==ERROR== ERR_NVGPUCTRPERM"),
        (one_line_a_counter().replace(profiling.HITS, "another"), "expected .* of 3 launches"),
        ("\n".join(one_line_a_counter().splitlines()[:-5]), "expected .* of 3 launches"),
    ],
)
def test_what_is_missing_is_named(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "l2.csv").write_text(text)
    assert profiling.main(["read", str(tmp_path / "l2.csv"), "--size", "tiny"]) == 1
    with pytest.raises(ValueError, match=message):
        profiling.counted_rows(text, "tiny")
    assert capsys.readouterr().err


def test_every_launch_runs_and_reads_its_rows_twice() -> None:
    profiling.launch_all("tiny")
    full = profiling.launches("gpu")
    assert [(x.N, x.V, x.inplace) for x in full] == [
        (8192, 151_936, False),
        (8192, 151_936, True),
        (1024, 151_936, False),
    ]
    assert full[2].size == 1024 * 151_936 * 4
