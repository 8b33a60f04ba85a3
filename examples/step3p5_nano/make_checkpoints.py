# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Export the nano model in every layout, where that is not done yet: `make ckpts`.

python -m examples.step3p5_nano.make_checkpoints FOLDER
"""

import sys
from pathlib import Path

from examples.step3p5_nano.lab import make_checkpoints

if __name__ == "__main__":
    for path in make_checkpoints(Path(sys.argv[1]).absolute()).values():
        print(path)
