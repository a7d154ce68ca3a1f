"""The trace replay viewer (docs/viewer.md): `python -m agent_loop.view RUN [RUN2]`.

rows.py     one line of an episode file -> one row of the list
index.py    all rows of some runs, kept in a cache that is rebuilt at will
search.py   filters, order and full-text search over the rows
detail.py   one episode as the page needs it: dialogue, columns of token numbers
pieces.py   token ids -> text
server.py   the read-only server on loopback
export.py   the same pages in one HTML file
trajectory.py  one episode as ATIF
text.py     the terminal's reader
tui.py      the terminal's screens (tui_episode.py, tui_parts.py)
static/     the pages: ES modules, shipped as they are
"""
