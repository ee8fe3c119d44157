"""Tables in HTML: the page's script sorts and filters them."""

import html

from roli_jax.results.tables import Table


def as_html(table: Table) -> str:
  """Returns the table, folded under its title."""
  header = "".join(f"<th scope=col>{html.escape(x)}</th>" for x in table.header)
  lines = "\n".join(
    "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    for row in table.rows
  )
  note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
  return (
    f"<details class=table><summary>{html.escape(table.title)}"
    f" <small>{len(table.rows)} rows</small></summary>\n"
    f'<div class=wide><table class="data"><thead><tr>{header}</tr></thead>'
    f"<tbody>\n{lines}\n</tbody></table></div>{note}</details>"
  )
