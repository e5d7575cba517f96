"""How results are shown and saved, and how bad input is refused.

The files, in the order of their imports:

errors.py     checks of values, how errors quote what was given, and how a process ended
documented.py the fields of a dataclass in its help
warning.py    warnings at the user's line
tables.py     byte counts as text, HTML tables
reading.py    JSON files of other programs: read, or refused by name
saving.py     atomic writes of files and folders
temporary.py  temporary folders, removed when their process ends
remarks.py    remarks of bitsandbytes that a user can do nothing about, dropped
live.py       what changes while a cell runs: below the cell, or in the terminal
figure.py     the colour palette, and an empty matplotlib figure that notebooks display
diagrams.py   two diagrams of the notebooks: the parts of a block, GPUs over time
page.py       a self-contained HTML page for a view, and the escaping of text
"""
