"""The numbers in README.md and docs/faq.rst: rendered from the results, and written by this script.

Run from the root of the repository whenever results have changed; a test compares them::

    PYTHONPATH=. python docs/_ext/readme_numbers.py
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured_pages

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Block:
    """Lines of a file between two marks."""

    file: str
    begin: str
    end: str
    template: str

    def written(self) -> str:
        """Return the lines in the file."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        return text.split(self.begin)[1].split(self.end)[0]

    def rendered(self, values: dict[str, Any]) -> str:
        """Return the lines that the results make."""
        lines = measured_pages.environment().from_string(self.template).render(values).splitlines()
        options: dict[str, Any] = {"width": 118, "break_long_words": False}
        filled = [
            textwrap.fill(line, subsequent_indent="  " * line.startswith("- "), **options)
            for line in lines
            if line.strip()
        ]
        return "\n".join(filled) + "\n"


README = Block(
    "README.md",
    "<!-- from benchmarks/results -->\n",
    "<!-- to here -->\n",
    """\
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
{{ "; " if not loop.last else ", " }}{% endfor %}\
on {{ defaults["machine"] | computer }}.

{% endif %}
- **The published method**, exact: {{ sizes["K"] }} of \
{{ "{:,}".format(sizes["n_candidates"]) }} images with a {{ sizes["network"] }} of \
{{ "{:,}".format(sizes["n_parameters"]) }} parameters take \
{{ ours["total"]["median"] | duration }}; in the authors' way the same choice would take \
{{ authors["total"]["median"] | duration }}. Measured on {{ query["machine"] | computer }}.
""",
)
FIRST_LABELS = Block(
    "docs/faq.rst",
    ".. first labels, from benchmarks/results\n\n",
    "\n.. to here\n",
    """\
{% if third and third["first"] %}
Networks trained on such a batch were ahead of those trained on as many random samples, by \
{% for n, found in third["first"].items() %}\
{{ found["gain"] | with_interval }} points of accuracy with {{ n }} labels\
{{ ", " if not loop.last else " " }}{% endfor %}\
({{ (third["first"].values() | first)["n_settings"] }} settings with features of images, texts and \
tables; 95% intervals).
{% endif %}
""",
)
SECONDS = Block(
    "docs/faq.rst",
    ".. seconds, from benchmarks/results\n\n",
    "\n.. to here\n",
    """\
{% if defaults %}
{{ "=" * 76 }}  ========  =================
{% set head = "Pool, network, batch; " ~ (defaults["machine"] | computer) %}
{{ "%-76s" | format(head) }}  {{ "%-8s" | format("Query") }}  Memory
{{ "=" * 76 }}  ========  =================
{% for name, found in defaults["cases"].items() %}
{{ "%-76s" | format(name) }}  {{ "%-8s" | format(found["seconds"] | duration) }}  \
{{ found["bytes"] | size }}
{% endfor %}
{{ "=" * 76 }}  ========  =================
{% endif %}
""",
)
BLOCKS = (README, FIRST_LABELS, SECONDS)


def values() -> dict[str, Any]:
    """Return all that was measured."""
    found: dict[str, Any] = measured_pages.measured() | measured_pages.study()
    return found


if __name__ == "__main__":
    measured = values()
    for block in BLOCKS:
        path = ROOT / block.file
        between = re.compile(
            f"(?<={re.escape(block.begin)}).*?(?={re.escape(block.end)})", re.DOTALL
        )
        text = path.read_text(encoding="utf-8")
        new = between.sub(lambda _, block=block: block.rendered(measured), text)
        path.write_text(new, encoding="utf-8")
