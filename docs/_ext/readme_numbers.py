"""The numbers in README.md: rendered from the results, and written into the file by this script.

Run from the root of the repository whenever results have changed; a test compares the two::

    PYTHONPATH=. python docs/_ext/readme_numbers.py
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import measured_pages

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- from benchmarks/results -->\n", "<!-- to here -->\n"
TEMPLATE = """\
{% set sizes, ours = query["query"]["sizes"], query["query"]["ours"] %}
{% set authors = query["query"]["theirs"]["authors'"] %}
{% set better = [outcomes["balanced"]["better"], outcomes["long-tailed"]["better"]] %}
{% set worse = outcomes["balanced"]["worse"] + outcomes["long-tailed"]["worse"] %}
{% if third %}
{% set minus = third["minus"] %}
- **Labels**: to reach the accuracy of 100 labels drawn at random, a network needed about \
{{ (100 * third["needed"]) | round | int }} chosen ones, in the median of \
{{ third["n_settings"] }} settings with features of images, texts and tables. On balanced pools \
that is {{ minus["balanced"]["random"] | with_interval }} points of accuracy, on long-tailed ones \
{{ minus["long-tailed"]["random"] | with_interval }} (95% intervals).
- **First labels** that cover the inputs gain, over random ones, \
{% for n, found in third["first"].items() %}\
{{ found["gain"] | with_interval }} points with {{ n }}{{ "; " if not loop.last else "." }}\
{% endfor %}

{% else %}
- **Labels**: in {{ settings | length }} settings with features of images, texts and tables, \
Fisher information with a share of coverage was better than {{ better[0] | length }} of \
{{ peers | length }} other strategies on balanced pools and than {{ better[1] | length }} on \
long-tailed ones, random sampling among them, and worse than {{ worse | length or "none" }}. \
Coverage alone, the default now, did about as well.
{% endif %}
{% if defaults %}
- **Time and memory** of a query with defaults: \
{% for name, found in defaults["cases"].items() if "200,000" in name or "images" in name %}\
{{ name }}: {{ found["seconds"] | duration }}, {{ found["bytes"] | size }}\
{{ "; " if not loop.last else "." }}{% endfor %}

{% endif %}
- **The published method**, exact: {{ sizes["K"] }} of \
{{ "{:,}".format(sizes["n_candidates"]) }} images with a {{ sizes["network"] }} of \
{{ "{:,}".format(sizes["n_parameters"]) }} parameters take \
{{ ours["total"]["median"] | duration }}; in the authors' way the same choice would take \
{{ authors["total"]["median"] | duration }}. Measured on {{ query["machine"] | computer }}.
"""


def values() -> dict[str, Any]:
    """Return all that was measured."""
    found: dict[str, Any] = measured_pages.measured() | measured_pages.study()
    return found


def numbers(values: dict[str, Any]) -> str:
    """Return the lines between the two marks."""
    rendered = measured_pages.environment().from_string(TEMPLATE).render(values)
    options: dict[str, Any] = {"width": 118, "subsequent_indent": "  ", "break_long_words": False}
    lines = [textwrap.fill(line, **options) for line in rendered.splitlines() if line.strip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    between = re.compile(f"(?<={BEGIN}).*(?={END})", re.DOTALL)
    README.write_text(between.sub(lambda _: numbers(values()), text), encoding="utf-8")
