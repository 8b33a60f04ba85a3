# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-quark project
"""Write the generated pages of docs/ again, from the results that are stored beside them.

python -m benchmarks.write_pages
"""

import json
import sys

from benchmarks.pages import DOCS, PAGES, write_results


def main() -> int:
    for name in PAGES:
        page = DOCS / f"{name}.md"
        write_results(page, json.loads(page.with_suffix(".json").read_text()))
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
