import re
import subprocess
import sys

import torch
from helpers import TINY, write_export

from sret_cli.model.sret import build_model


def test_the_python_example_in_a_model_card_reads_the_model(tmp_path):
    write_export(build_model(TINY), "safetensors", tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    torch.save(torch.zeros(1, 3, 16, 16), tmp_path / "images.pt")
    code = f"import torch\nimages = torch.load('../images.pt')\n{code}print(logits.shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "model", capture_output=True, text=True
    )
    assert done.stdout == "torch.Size([1, 10])\n", done.stderr
