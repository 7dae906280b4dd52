import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sret_cli.runtime.signs import fit_to_encoding

ENCODINGS = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def run(*arguments, cwd, **environment):
    """Exit code, stdout and stderr of `sret`, as bytes."""
    done = subprocess.run(
        [sys.executable, "-m", "sret_cli", *arguments],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "250", **environment},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "encoding", "shown"),
    [
        ("1.0 ± 0.5 – …", "utf-8", "1.0 ± 0.5 – …"),
        ("1.0 ± 0.5 – …", "latin-1", "1.0 ± 0.5 - ..."),
        ("a − b ± c", "ascii", "a - b +- c"),
        ("café 日", "latin-1", r"café \\u65e5"),
        ("caf\udce9", "utf-8", r"caf\udce9"),
    ],
)
def test_signs_that_an_encoding_lacks_are_written_in_ascii(text, encoding, shown):
    assert fit_to_encoding(text, encoding) == shown.replace("\\\\", "\\")


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENCODINGS)
def test_a_table_is_shown_on_a_terminal_of_any_encoding(tmp_path, environment):
    code, out, err = run("profile", "--preset", "nano", cwd=tmp_path, **environment)
    assert (code, err) == (0, b"")
    lines = out.decode("ascii").splitlines()
    assert [cell.strip() for cell in lines[1].split("|")[1:4]] == ["Model", "Layers", "Params (M)"]
    assert len({len(line) for line in lines[:5]}) == 1


@pytest.mark.slow
def test_columns_stay_in_line_where_signs_are_spelled_out(tmp_path):
    code, out, err = run("profile", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, b"")
    table = [line for line in out.decode("ascii").splitlines() if line.startswith(("|", "+"))]
    assert len({len(line) for line in table}) == 1
    (deep,) = [line for line in table if "deep" in line]
    assert [cell.strip() for cell in deep.split("|")[3:6]] == ["14.66", "-", "3.692"]


@pytest.mark.slow
@pytest.mark.parametrize("columns", ["0", "1", "20", "many"])
def test_no_number_is_lost_on_a_narrow_terminal(tmp_path, columns):
    code, out, err = run("profile", "--preset", "nano", cwd=tmp_path, COLUMNS=columns)
    assert (code, err) == (0, b"")
    for number in ("0.33", "0.00812", "0.86"):
        assert number in out.decode()


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, *ENCODINGS])
def test_names_in_no_encoding_are_checked_trained_on_and_reported(tmp_path, environment):
    folder = os.fsencode(tmp_path) + b"/odd\xff"
    for split in (b"train", b"test"):
        for name in (b"caf\xe9", "日–本".encode()):
            os.makedirs(b"/".join((folder, split, name)))
            for number in range(4):
                pixels = np.full((16, 16, 3), 20 * number, dtype=np.uint8)
                path = b"/".join((folder, split, name, b"\xfe%d.png" % number))
                Image.fromarray(pixels).save(os.fsdecode(path))
    study = b"study\xff.toml"
    with open(os.fsencode(tmp_path) + b"/" + study, "w", encoding="utf-8") as file:
        file.write(
            '[model]\npreset = "nano"\nembed_dims = [8, 16, 32]\n'
            "[train]\nepochs = 1\nbatch_size = 8\n"
            '[[runs]]\nname = "é–日"\n"train.seed" = 1\n'
            '[[runs]]\nname = ":cat:"\n"train.seed" = 2\n'
        )
    code, out, err = run("data", "check", b"odd\xff", cwd=tmp_path, **environment)
    assert (code, b"Traceback" in err) == (0, False), err
    code, out, err = run("run", study, "--data-dir", b"odd\xff", cwd=tmp_path, **environment)
    assert (code, b"Traceback" in err) == (0, False), err
    assert b":cat:" in out
    (report,) = tmp_path.glob("runs/*/report")
    assert (report / "table.csv").read_text(encoding="utf-8").count("odd\\udcff") == 2


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(tmp_path, closed):
    number = {"stdout": 1, "stderr": 2}[closed]
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m sret_cli build --preset nano {number}>&-', sys.executable],
        cwd=tmp_path,
        capture_output=True,
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_full_disk_under_the_output_is_one_line(tmp_path, flags):
    command = [sys.executable, "-m", "sret_cli", "profile", "--preset", "nano", *flags]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
    message = b"sret: no room left on the disk for the output; free some\n"
    assert (done.returncode, done.stderr) == (7, message)
