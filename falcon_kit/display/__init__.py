"""How results are shown and bad input is refused.

The files, in the order of their imports:

errors.py  a check with its message, and the text about an unknown name
tables.py  byte counts as text, HTML tables
saving.py  files and folders that are complete or absent
figure.py  the palette, and the empty matplotlib figure that every plot starts from
page.py    the self-contained HTML page that every view starts from, with its escaping
"""
