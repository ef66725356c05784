"""One look for every page that is written."""

from __future__ import annotations

import html

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #5b6570; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #15181c; --line: #363c44; --soft: #9aa4af; --card: #1d2126; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 66rem;
  margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; font-size: 1.25rem; }
p.lead, figcaption, .source { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; white-space: normal; vertical-align: bottom; }
figure { margin: 1.2rem 0; } figure svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
details { background: var(--card); border-radius: 6px; padding: .5rem .9rem; margin: .6rem 0; }
pre { overflow-x: auto; font-size: .8rem; }
"""


def page(title: str, lead: str, body: str) -> str:
    """A self-contained HTML page.

    Args:
        title: plain text.
        lead: one paragraph of HTML under it.
        body: HTML.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{lead}</p>
{body}
</body></html>
"""
