"""The trace replay viewer (docs/viewer.md): `python -m agent_loop.view RUN [RUN2]`.

rows.py     one line of an episode file -> one row of the list
index.py    all rows of some runs, kept in a cache that is rebuilt at will
search.py   filters, order and full-text search over the rows
detail.py   one episode as the page needs it: dialogue, columns of token numbers
pieces.py   token ids -> text
pages.py    the page store that a run's tools read from
fork.py     an episode played again up to a turn, and on otherwise
whatif.py   forks of a run's episodes, stored beside them
engine.py   a model folder as a server, for forks
server.py   the server on loopback: it reads, and plays forks if asked to
export.py   the same pages in one HTML file
trajectory.py  one episode as ATIF
text.py     the terminal's reader
tui.py      the terminal's screens (tui_episode.py, tui_parts.py)
static/     the pages: ES modules, shipped as they are
"""

WANTED = "wanted is a run's folder (runs/ID), a folder of episode files (*.jsonl), or one such file"
